#!lua flags=allow-oom
-- needs: clock places lists payload
-- Put claimed tasks back at the head of their lists, and wake workers that serve them. Or pass tasks on to the end of
-- the list of the model that they are for.
-- KEYS: in-flight hash
-- ARGV: bytes of payload after which to stop, then (seq, '1' if it has run at least in part, which counts as a
--       delivery, model to pass it on to or ''), in the order in which they are put back
-- Returns {how many of the seqs were processed, how many were put back, {list, why, ...} of tasks that stay in flight}.
-- The caller calls again for the rest.
local bytes, done, back, wakes, stuck = tonumber(ARGV[1]), 0, 0, {}, {}
for i = 2, #ARGV, 3 do
  if bytes <= 0 then break end
  local seq, ran, other = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local payload, list = unpack(redis.call('HMGET', KEYS[1], seq, seq .. ':list'))
  if payload and list then
    bytes = bytes - #payload
    local to, tier, model, why = list, nil, nil, nil
    if other ~= '' then
      to = list_of(list, other)
      tier, model, why = pass_on(to, payload)
      if not why then
        local _, index = place_of(list)
        redis.call('HINCRBY', CLAIMED, counter_of(list, index), -1)
      end
    else
      if ran == '1' then payload = counted(payload, 0) end
      tier, model, why = put_back(list, payload)
    end
    if why then
      stuck[#stuck + 1], stuck[#stuck + 2] = to, why
    else
      redis.call('HDEL', KEYS[1], seq, seq .. ':list')
      local key = tier .. '.' .. model
      wakes[key] = wakes[key] or {tier, model, 0}
      wakes[key][3] = wakes[key][3] + 1
      back = back + 1
    end
  end
  done = done + 1
end
for _, one in pairs(wakes) do wake_for(unpack(one)) end
return {done, back, stuck}
