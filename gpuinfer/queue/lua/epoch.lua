#!lua flags=allow-oom
-- Begin an epoch of a worker: for a process of its name, a restore, or a claim with an uncertain outcome.
-- KEYS: epoch hash
-- ARGV: the caller's own epoch so far (a Redis that has lost the last writes may be behind it; 0: a new
--       process or a restore, which takes over), who begins it
-- Returns the number of the epoch that begins.
local format = redis.call('GET', FORMAT_KEY)
if not format then
  redis.call('SET', FORMAT_KEY, FORMAT)
elseif format ~= FORMAT then
  return redis.error_reply('FORMAT ' .. format)
end
local own, counted = tonumber(ARGV[1]), tonumber(redis.call('HGET', KEYS[1], 'number') or 0)
-- Another process has taken over; or the call was held up on its way, and its caller has counted again.
if own > 0 and counted > own then return redis.error_reply('STALE epoch ' .. own .. ', now is ' .. counted) end
local epoch = math.max(counted, own) + 1
redis.call('HSET', KEYS[1], 'number', epoch, 'by', ARGV[2])
if string.find(ARGV[2], '^reaper') then redis.pcall('HINCRBY', COUNTS, 'reaped - -', 1) end
return epoch
