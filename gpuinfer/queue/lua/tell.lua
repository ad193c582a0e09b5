#!lua flags=allow-oom
-- Store a watcher's report on its host's instances, and return the reports of all hosts. Runs in a full Redis, too.
-- KEYS: hash of all hosts
-- ARGV: host, report (JSON)
-- Returns {host, report, ...}.
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return redis.call('HGETALL', KEYS[1])
