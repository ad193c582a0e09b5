#!lua flags=allow-oom
-- needs: lists
-- Put claimed tasks back at the head of their lists, in their order, and wake who may take them. Or pass them
-- on to the lists of the model that they are for, behind what was passed on before them.
-- KEYS: in-flight hash
-- ARGV: (seq, '1' when it has run, in part at least: that was a delivery, the model to pass it on to or '')
--       in the order they were claimed
-- Returns how many were put back.
local back, wakes = 0, {}
local function note(tier, model)
  local key = tier .. '.' .. model
  wakes[key] = wakes[key] or {tier, model, 0}
  wakes[key][3] = wakes[key][3] + 1
  back = back + 1
end
local function held(seq) return unpack(redis.call('HMGET', KEYS[1], seq, seq .. ':list')) end
for i = #ARGV - 2, 1, -3 do
  local seq = ARGV[i]
  local payload, list = held(seq)
  if payload and list and ARGV[i + 2] == '' then
    if ARGV[i + 1] == '1' and string.sub(payload, 1, 1) == '{' then
      -- As restore.lua counts it.
      local head, deliveries, deaths = string.match(payload, '^({"gpuinfer": %[(%d+), (%d+)%], )')
      local rest = head and string.sub(payload, #head + 1) or string.sub(payload, 2)
      payload = string.format('{"gpuinfer": [%d, %d], ', (deliveries or 0) + 1, deaths or 0) .. rest
    end
    note(put_back(list, payload))
    redis.call('HDEL', KEYS[1], seq, seq .. ':list')
  end
end
for i = 1, #ARGV, 3 do
  local seq = ARGV[i]
  local payload, list = held(seq)
  if payload and list and ARGV[i + 2] ~= '' then
    note(pass_on(list_of(list, ARGV[i + 2]), payload))
    redis.call('HINCRBY', CLAIMED, list, -1)
    redis.call('HDEL', KEYS[1], seq, seq .. ':list')
  end
end
for _, one in pairs(wakes) do wake_for(unpack(one)) end
return back
