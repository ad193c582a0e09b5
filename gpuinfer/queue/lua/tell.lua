#!lua flags=allow-oom
-- Tell the other hosts' watchers about one's own instances, also when Redis is full, and hear theirs.
-- KEYS: hash of all hosts
-- ARGV: host, what it tells (JSON)
-- Returns the hash: host, what it tells, ...
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return redis.call('HGETALL', KEYS[1])
