#!lua flags=allow-oom
-- Pop up to N tasks, the most urgent first, and record them as in flight, in one step.
-- KEYS: in-flight hash, waiting hash, bell, life counter, then the lists in the order they are served
-- ARGV: N, ageing in milliseconds (0: off), the first sequence id to use, the life of the claimer,
--       result key prefix when a task that comes alone runs at once and is noted as begin.lua does, else '',
--       the hash that counts for the watcher how many tasks were ever claimed from each list,
--       how many bytes of payload to take at most; one task is taken whatever its size
-- Returns {seq, list index (1-based; negative: it has aged and goes first), payload, seq, ...}, and
-- at the end the id of the task noted as running, if there is one.
-- Payloads are not parsed.
local inflight, waiting, bell = KEYS[1], KEYS[2], KEYS[3]
local room, ageing, seq = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local counts, bytes = ARGV[6] or '', tonumber(ARGV[7] or 'inf')
local claimed = {}
local left = 0

-- A claim of an earlier life, held up on its way, or of a worker whose name another one has taken
-- over, must not take anything: nobody would know of it. A Redis that has lost the last second's
-- writes may be behind.
local life, counted = tonumber(ARGV[4]), tonumber(redis.call('GET', KEYS[4]) or 0)
if counted > life then return redis.error_reply('STALE claim of life ' .. life .. ', now is ' .. counted) end
if counted < life then redis.call('SET', KEYS[4], life) end

-- One payload tells how many of its size fit. A list that is emptied waits for nothing. What is popped is
-- recorded by one command: a call costs more than the field it sets.
local function take(index, aged)
  local list, few, before, place = KEYS[index], 1, room, aged and 4 - index or index - 4
  while room > 0 and bytes > 0 do
    local popped = redis.call('RPOP', list, math.min(room, few))
    if not popped then break end
    room = room - #popped
    local fields, n, c = {}, 0, #claimed
    for i = 1, #popped do
      local payload, field = popped[i], string.format('%.0f', seq)
      fields[n + 1], fields[n + 2], fields[n + 3], fields[n + 4] = field, payload, field .. ':list', list
      claimed[c + 1], claimed[c + 2], claimed[c + 3] = seq, place, payload
      n, c, seq, bytes = n + 4, c + 3, seq + 1, bytes - #payload
    end
    for first = 1, n, 1000 do
      redis.call('HSET', inflight, unpack(fields, first, math.min(first + 999, n)))
    end
    few = math.max(1, math.floor(bytes / (#claimed[#claimed] + 1)))
  end
  if room == before then return false end
  if counts ~= '' then redis.call('HINCRBY', counts, list, before - room) end
  if redis.call('LLEN', list) == 0 then redis.call('HDEL', waiting, list) end
  return true
end

local sizes, busy = {}, {}
for index = 5, #KEYS do
  sizes[index] = redis.call('LLEN', KEYS[index])
  if sizes[index] > 0 then busy[#busy + 1] = index end
end

-- Ageing: a list with work that was passed over for long enough goes first, once.
if ageing > 0 and (#busy > 1 or redis.call('EXISTS', waiting) == 1) then
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local since = {}
  local flat = redis.call('HGETALL', waiting)
  for i = 1, #flat, 2 do since[flat[i]] = tonumber(flat[i + 1]) end
  local oldest, oldest_index = nil, nil
  for index = 5, #KEYS do
    local list = KEYS[index]
    if sizes[index] == 0 then
      if since[list] then redis.call('HDEL', waiting, list) end
    elseif not since[list] then
      redis.call('HSET', waiting, list, now)
    elseif since[list] <= now - ageing and (not oldest or since[list] < oldest) then
      oldest, oldest_index = since[list], index
    end
  end
  local served = {}
  if oldest_index then served[oldest_index] = take(oldest_index, true) end
  for _, index in ipairs(busy) do
    if take(index) or served[index] then
      if redis.call('LLEN', KEYS[index]) > 0 then redis.call('HSET', waiting, KEYS[index], now) end
    end
  end
else
  for _, index in ipairs(busy) do take(index) end
end

-- What is left is another worker's: ring for it.
if #claimed > 0 and (room <= 0 or bytes <= 0) then
  for _, index in ipairs(busy) do
    left = left + redis.call('LLEN', KEYS[index])
    if left > 0 then break end
  end
  if left > 0 and redis.call('LLEN', bell) == 0 then redis.call('LPUSH', bell, 1) end
end
-- The id is the header of that name, as in restore.lua; the worker compares it with what it reads. A
-- payload too long to search through, or a task that has its final state, is left to begin.lua.
if ARGV[5] ~= '' and #claimed == 3 and #claimed[3] <= 16384 then
  local id = string.match(claimed[3], '"id": ?"([^"]+)"')
  local meta = id and redis.call('GETRANGE', ARGV[5] .. id, 0, 31)
  local state = id and string.match(meta, '^{"status": ?"(%u+)"')
  if id and state ~= 'SUCCESS' and state ~= 'FAILURE' and state ~= 'REVOKED' then
    redis.call('HSET', inflight, 'running', string.format('%.0f', claimed[1]))
    claimed[4] = id
  end
end
return claimed
