#!lua flags=allow-oom
-- Register the id prefix of a client process, by which an expired task can be told from an unknown one. Runs in a full
-- Redis, too.
-- ARGV: prefix
redis.call('ZADD', ORIGINS, redis.call('TIME')[1], ARGV[1])
redis.call('ZREMRANGEBYRANK', ORIGINS, 0, -1 - ORIGINS_MOST)
