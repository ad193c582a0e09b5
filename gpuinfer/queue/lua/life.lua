#!lua flags=allow-oom
-- Count a life of a worker: a process of its name, a restore, or a doubt about what it has claimed.
-- KEYS: life counter
-- ARGV: the caller's own life so far; a Redis that has lost the last second's writes may be behind it; 0: a
--       new process, which takes over
-- Returns the number of the life that begins.
local own, counted = tonumber(ARGV[1]), tonumber(redis.call('GET', KEYS[1]) or 0)
-- Another process has taken over; or the call was held up on its way, and its caller has counted again.
if own > 0 and counted > own then return redis.error_reply('STALE life ' .. own .. ', now is ' .. counted) end
local life = math.max(counted, own) + 1
redis.call('SET', KEYS[1], life)
return life
