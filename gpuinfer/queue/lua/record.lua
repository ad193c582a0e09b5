#!lua
-- Write one value of each of some series. No allow-oom: a full Redis is for tasks, not for metrics.
-- ARGV: 1 prefix of the keys of this chunk, 2 bytes of a chunk, 3 offset of the value in the chunk, 4 TTL of the chunk
--       in seconds, 5 the time, 6 maximum number of series, then (name, two bytes) of each series
-- Returns how many series were left out because of the maximum.
local prefix, size, at, kept, now, most = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
local count, left = redis.call('HLEN', SERIES), 0
for i = 7, #ARGV, 2 do
  local name = ARGV[i]
  local known = redis.call('HEXISTS', SERIES, name) == 1
  if known or count < most then
    if not known then count = count + 1 end
    local chunk = prefix .. name
    -- Create the chunk at its full length: a string that grows takes up to twice its size.
    if redis.call('EXISTS', chunk) == 0 then
      redis.call('SETRANGE', chunk, size - 1, '\0')
      redis.call('EXPIRE', chunk, kept)
    end
    redis.call('SETRANGE', chunk, at, ARGV[i + 1])
    redis.call('HSET', SERIES, name, now)
  else
    left = left + 1
  end
end
return left
