#!lua flags=allow-oom
-- needs: lists states
-- Put a dead worker's tasks back at the head of their lists and count the death against those that ran.
-- A task whose deaths reach the limit stays in flight and is reported: the caller settles it as dead.
-- KEYS: in-flight hash, epoch hash
-- ARGV: the epoch that the caller has begun for this (in a later one there is another worker), deaths at which
--       a task is given up, pending meta
-- Returns {put back, {ids of the first thousand put back}, then (seq, list, payload, deaths) of each
-- task to give up}.
-- The counts travel in front of the payload, as text, so that no payload is parsed:
--   {"gpuinfer": [deliveries, deaths], <the rest as the producer wrote it>
local epoch, counted = tonumber(ARGV[1]), tonumber(redis.call('HGET', KEYS[2], 'number') or 0)
if counted > epoch then return redis.error_reply('STALE restore of epoch ' .. epoch .. ', now is ' .. counted) end
local inflight, limit = KEYS[1], tonumber(ARGV[2])

-- What had begun waits again, and says so. The id is the header of that name; in the body, JSON in
-- JSON, its quotes would be escaped.
local ids = {}
local function wait_again(payload)
  local id = string.match(payload, '"id": ?"([^"]+)"')
  if id and #ids < 1000 then ids[#ids + 1] = id end
  if id and state_of(id) == 'STARTED' then write_passing(id, ARGV[3]) end
end
local fields = redis.call('HKEYS', inflight)
local seqs = {}
for _, field in ipairs(fields) do
  local seq = tonumber(field)
  if seq then seqs[#seqs + 1] = seq end
end
table.sort(seqs, function(a, b) return a > b end)

local ran = {}
for seq in string.gmatch(redis.call('HGET', inflight, 'running') or '', '%d+') do ran[tonumber(seq)] = true end
redis.call('HDEL', inflight, 'running')

local answer, back, wakes = {0, ids}, 0, {}
for _, number in ipairs(seqs) do
  local seq = string.format('%.0f', number)
  local payload = redis.call('HGET', inflight, seq)
  local list = redis.call('HGET', inflight, seq .. ':list')
  if not list then
    redis.call('HDEL', inflight, seq)
  else
    local head, deliveries, deaths = string.match(payload, '^({"gpuinfer": %[(%d+), (%d+)%], )')
    local rest = head and string.sub(payload, #head + 1) or string.sub(payload, 2)
    deliveries, deaths = (deliveries or 0) + 1, (deaths or 0) + (ran[number] and 1 or 0)
    if string.sub(payload, 1, 1) == '{' then
      payload = string.format('{"gpuinfer": [%d, %d], ', deliveries, deaths) .. rest
    end
    if deaths >= limit then
      -- Kept, with its count, until the caller has written its end.
      redis.call('HSET', inflight, seq, payload)
      for _, part in ipairs({seq, list, payload, deaths}) do answer[#answer + 1] = part end
    else
      wait_again(payload)
      local tier, model = put_back(list, payload)
      redis.call('HDEL', inflight, seq, seq .. ':list')
      if tier then
        local key = tier .. '.' .. model
        wakes[key] = wakes[key] or {tier, model, 0}
        wakes[key][3] = wakes[key][3] + 1
      end
      back = back + 1
    end
  end
end
for _, one in pairs(wakes) do wake_for(unpack(one)) end
answer[1] = back
return answer
