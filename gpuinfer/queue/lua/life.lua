#!lua flags=allow-oom
-- Count a life of a worker: a process of its name, or a doubt about what it has claimed.
-- KEYS: life counter
-- ARGV: the caller's own life so far; a Redis that has lost the last second's writes may be behind it
-- Returns the number of the life that begins.
local life = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), tonumber(ARGV[1])) + 1
redis.call('SET', KEYS[1], life)
return life
