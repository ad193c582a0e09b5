#!lua
-- Write one moment of some series. Without allow-oom: a full Redis keeps tasks, and no history.
-- ARGV: 1 prefix of the keys of this chunk, 2 bytes of a chunk, 3 byte of the moment in it, 4 seconds that the chunk is
--       kept, 5 the time, 6 how many series there may be, then name and two bytes of each
-- Returns how many series were left out, as there are as many as may be already.
local prefix, size, at, kept, now, most = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
local count, left = redis.call('HLEN', SERIES), 0
for i = 7, #ARGV, 2 do
  local name = ARGV[i]
  local known = redis.call('HEXISTS', SERIES, name) == 1
  if known or count < most then
    if not known then count = count + 1 end
    local chunk = prefix .. name
    -- Made at once in its whole length: a text that grows takes up to twice its size.
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
