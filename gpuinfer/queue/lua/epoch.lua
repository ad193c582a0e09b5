#!lua flags=allow-oom
-- Begin an epoch of a worker's name: for a new process, for a restore, or after a claim with an uncertain outcome.
-- KEYS: epoch hash
-- ARGV: the process's epoch so far (a Redis that has lost its last writes may have a lower number; 0: a new process or
--       a restore, which takes over), who begins it
-- Returns the number of the new epoch.
local format = redis.call('GET', FORMAT_KEY)
if not format then
  redis.call('SET', FORMAT_KEY, FORMAT)
elseif format ~= FORMAT then
  return redis.error_reply('FORMAT ' .. format)
end
local own, counted = tonumber(ARGV[1]), tonumber(redis.call('HGET', KEYS[1], 'number') or 0)
-- Another process has taken over; or this call was delayed, and its sender has repeated it with a higher number.
if own > 0 and counted > own then return redis.error_reply('STALE epoch ' .. own .. ', now is ' .. counted) end
local epoch = math.max(counted, own) + 1
redis.call('HSET', KEYS[1], 'number', epoch, 'by', ARGV[2])
if string.find(ARGV[2], '^reaper') then redis.pcall('HINCRBY', COUNTS, 'reaped - -', 1) end
return epoch
