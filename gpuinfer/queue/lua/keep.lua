#!lua flags=allow-oom
-- Store what a watcher has to know after a restart, and its newest decision. Runs in a full Redis, too: otherwise the
-- watcher could later take its own commands for an administrator's. Both are small and bounded.
-- KEYS: the watcher's memory, list of decisions
-- ARGV: memory (JSON), decision (JSON; '': none), maximum number of decisions
redis.call('SET', KEYS[1], ARGV[1])
if ARGV[2] ~= '' then
  redis.call('LPUSH', KEYS[2], ARGV[2])
  redis.call('LTRIM', KEYS[2], 0, ARGV[3] - 1)
end
