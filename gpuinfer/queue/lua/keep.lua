#!lua flags=allow-oom
-- Keep what a watcher is to know after a restart, and its newest decision, also when Redis is full: what
-- it has commanded must not be taken for somebody else's wish then. Both are small, and bounded.
-- KEYS: its memory, list of decisions
-- ARGV: memory (JSON), decision (JSON; empty: none), decisions kept
redis.call('SET', KEYS[1], ARGV[1])
if ARGV[2] ~= '' then
  redis.call('LPUSH', KEYS[2], ARGV[2])
  redis.call('LTRIM', KEYS[2], 0, ARGV[3] - 1)
end
