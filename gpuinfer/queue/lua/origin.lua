#!lua flags=allow-oom
-- Note a client process, also when Redis is full: by the prefix of its ids an expired task is told from an unknown one.
-- ARGV: prefix
redis.call('ZADD', ORIGINS, redis.call('TIME')[1], ARGV[1])
redis.call('ZREMRANGEBYRANK', ORIGINS, 0, -1 - ORIGINS_MOST)
