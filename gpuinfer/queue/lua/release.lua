#!lua flags=allow-oom
-- Put claimed tasks back at the head of their lists, in their order, and ring for them.
-- KEYS: in-flight hash
-- ARGV: bell prefix, separator of priority lists, the hash that counts what was claimed from each list,
--       then (seq, '1' when it has run, in part at least: that was a delivery) in the order they were claimed
-- Returns how many were put back.
local back = 0
for i = #ARGV - 1, 4, -2 do
  local seq = ARGV[i]
  local payload = redis.call('HGET', KEYS[1], seq)
  local list = redis.call('HGET', KEYS[1], seq .. ':list')
  if payload and list then
    if ARGV[i + 1] == '1' and string.sub(payload, 1, 1) == '{' then
      -- As restore.lua counts it.
      local head, deliveries, deaths = string.match(payload, '^({"gpuinfer": %[(%d+), (%d+)%], )')
      local rest = head and string.sub(payload, #head + 1) or string.sub(payload, 2)
      payload = string.format('{"gpuinfer": [%d, %d], ', (deliveries or 0) + 1, deaths or 0) .. rest
    end
    redis.call('RPUSH', list, payload)
    redis.call('HINCRBY', ARGV[3], list, -1)
    redis.call('HDEL', KEYS[1], seq, seq .. ':list')
    local at = string.find(list, ARGV[2], 1, true)
    local bell = ARGV[1] .. (at and string.sub(list, 1, at - 1) or list)
    redis.call('LPUSH', bell, 1)
    redis.call('LTRIM', bell, 0, 63)
    back = back + 1
  end
end
return back
