#!lua flags=allow-oom
-- needs: lists
-- Put claimed tasks back at the head of their lists, in their order, and wake who may take them. Or pass them
-- on to the lists of another model: whose lists they were in, they are not for.
-- KEYS: in-flight hash
-- ARGV: (seq, '1' when it has run, in part at least: that was a delivery, the model to pass it on to or '')
--       in the order they were claimed
-- Returns how many were put back.
local back, wakes = 0, {}
for i = #ARGV - 2, 1, -3 do
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
    local target = list
    if ARGV[i + 2] ~= '' then
      target = list_of(list, ARGV[i + 2])
      redis.call('HINCRBY', CLAIMED, list, -1)
      redis.call('HINCRBY', CLAIMED, target, 1)
    end
    local tier, model = put_back(target, payload)
    redis.call('HDEL', KEYS[1], seq, seq .. ':list')
    local key = tier .. '.' .. model
    wakes[key] = wakes[key] or {tier, model, 0}
    wakes[key][3] = wakes[key][3] + 1
    back = back + 1
  end
end
for _, one in pairs(wakes) do wake_for(unpack(one)) end
return back
