#!lua flags=allow-oom
-- Count a life of a worker: a process of its name, or a doubt about what it has claimed.
-- KEYS: life counter
-- Returns the number of the life that begins.
return redis.call('INCR', KEYS[1])
