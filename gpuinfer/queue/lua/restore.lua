#!lua flags=allow-oom
-- Put a dead worker's tasks back at the head of their lists and count the death against those that ran.
-- A task whose deaths reach the limit stays in flight and is reported: the caller settles it as dead.
-- KEYS: in-flight hash, life counter
-- ARGV: bell prefix, separator of priority lists, deaths at which a task is given up,
--       result key prefix, pending meta, the hash that counts what was claimed from each list,
--       the life that the caller has begun for this; in a later one there is another worker
-- Returns {put back, {ids of the first thousand put back}, then (seq, list, payload, deaths) of each
-- task to give up}.
-- The counts travel in front of the payload, as text, so that no payload is parsed:
--   {"gpuinfer": [deliveries, deaths], <the rest as the producer wrote it>
local life, counted = tonumber(ARGV[7]), tonumber(redis.call('GET', KEYS[2]) or 0)
if counted > life then return redis.error_reply('STALE restore of life ' .. life .. ', now is ' .. counted) end
local inflight, bells, sep, limit = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])

-- What had begun waits again, and says so. The id is the header of that name; in the body, JSON in
-- JSON, its quotes would be escaped.
local ids = {}
local function wait_again(payload)
  local id = string.match(payload, '"id": ?"([^"]+)"')
  if id and #ids < 1000 then ids[#ids + 1] = id end
  local key = id and ARGV[4] .. id
  if key and string.match(redis.call('GETRANGE', key, 0, 31), '^{"status": ?"STARTED"') then
    redis.call('SET', key, ARGV[5])
  end
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

local answer, back = {0, ids}, 0
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
      redis.call('RPUSH', list, payload)
      redis.call('HINCRBY', ARGV[6], list, -1)
      redis.call('HDEL', inflight, seq, seq .. ':list')
      local at = string.find(list, sep, 1, true)
      local bell = bells .. (at and string.sub(list, 1, at - 1) or list)
      redis.call('LPUSH', bell, 1)
      redis.call('LTRIM', bell, 0, 63)
      back = back + 1
    end
  end
end
answer[1] = back
return answer
