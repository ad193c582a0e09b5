#!lua flags=allow-oom
-- needs: lists states payload
-- Pop up to N tasks of one model, the most urgent first, and record them as in flight, in one step.
-- KEYS: in-flight hash, epoch hash
-- ARGV: 1 epoch, 2 first sequence id to use, 3 how many bytes of payload to take at most (one task is taken
--       whatever its size), 4 ageing in milliseconds (0: off), 5 '1': a task that comes alone runs at once, and
--       is noted as begin.lua does, 6 the claimer's state: 'idle' (enters the idle workers when nothing comes),
--       'free' (nothing runs), 'busy' (leaves their part to idle workers), 7 worker, 8 group, 9 tiers (space
--       separated), 10 number of wants, then for each: how many tasks, the rank they must be better than, least
--       batch, number of models, the models; then lists that may have been filled by plain producers, to be
--       looked into
-- Returns {id of the task noted as running or '', the default model, then for each list: list, rank
-- (-1 - rank: it has aged and goes first), number of payloads, the payloads}. Sequence ids count up from the
-- first. Payloads are not parsed.
local inflight = KEYS[1]
local epoch, seq, bytes, ageing = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local state, worker, group = ARGV[6], ARGV[7], ARGV[8]

-- A claim of an earlier epoch, held up on its way, or of a worker whose name another one has taken over,
-- must not take anything: nobody would know of it. A Redis that has lost the last writes may be behind.
local counted = tonumber(redis.call('HGET', KEYS[2], 'number') or 0)
if counted > epoch then return redis.error_reply('STALE claim of epoch ' .. epoch .. ', now is ' .. counted) end
if counted < epoch then redis.call('HSET', KEYS[2], 'number', epoch) end

-- Which lists of these models hold work, in the order of serving.
local default = redis.call('GET', DEFAULT_MODEL) or ''
local tiers = {}
for tier in string.gmatch(ARGV[9], '%a+') do tiers[BASE[tier]] = true end
local wanted, indices, at = {}, {}, 11
for _ = 1, tonumber(ARGV[10]) do
  local want = {tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])}
  local first = at + 4
  at = first + tonumber(ARGV[at + 3])
  for i = first, at - 1 do
    local model = ARGV[i]
    wanted[model] = want
    indices[#indices + 1] = INDEX_PREFIX .. model
    if model == default then indices[#indices + 1] = INDEX_PREFIX end
  end
end
for i = at, #ARGV do
  if redis.call('LLEN', ARGV[i]) > 0 then index_list(ARGV[i]) end
end
local flat
if #indices == 1 then
  flat = redis.call('ZRANGE', indices[1], 0, -1, 'WITHSCORES')
else
  local n = #indices
  indices[n + 1] = 'WITHSCORES'
  flat = redis.call('ZUNION', n, unpack(indices))
end
local lists = {}
for i = 1, #flat, 2 do
  local list, rank = flat[i], tonumber(flat[i + 1])
  local tier, indexed = string.match(list, '^(%a+)%.?([^@\6]*)')
  local model = indexed == '' and default or indexed
  local want = wanted[model]
  if want and tiers[rank - rank % 10] and rank < want[2] and want[1] > 0 then
    lists[#lists + 1] = {key = list, rank = rank, tier = tier, model = model, indexed = indexed}
  end
end

-- Models take turns, and so do the callers of a model: who was served least goes first. Who comes anew stands
-- behind those who wait, and keeps that place: nobody is passed over because his list was empty, or was not.
local function take_turns(rivals)
  local names, most, new = {}, 0, {}
  for i, one in ipairs(rivals) do names[i] = one.key end
  local turns = redis.call('HMGET', TURNS, unpack(names))
  for i, one in ipairs(rivals) do
    one.turn = tonumber(turns[i])
    if one.turn and one.turn > most then most = one.turn end
  end
  for _, one in ipairs(rivals) do
    one.new = one.turn and 0 or 1
    if not one.turn then
      one.turn, new[#new + 1], new[#new + 2] = most, one.key, most
    end
  end
  if #new > 0 then redis.call('HSET', TURNS, unpack(new)) end
  table.sort(rivals, function(a, b)
    if a.turn ~= b.turn then return a.turn < b.turn end
    if a.new ~= b.new then return a.new < b.new end
    return a.key < b.key
  end)
end
-- The models that hold the most urgent work, each with its first list.
local top, met = {}, {}
for _, list in ipairs(lists) do
  if list.rank ~= lists[1].rank then break end
  if not met[list.model] then
    met[list.model] = true
    top[#top + 1] = {key = turn_of(list.rank, list.model), list = list}
  end
end
if #top > 1 then take_turns(top) end
local urgent = top[1] and top[1].list

-- Ageing: a list that was passed over for long enough goes first, once; at most in every fifth claim.
local aged, since, waits = nil, nil, false
if ageing > 0 and #lists > 0 and (#lists > 1 or redis.call('EXISTS', AGEING) == 1) then
  waits = true
  local fields = {''}
  for i, list in ipairs(lists) do fields[i + 1] = list.key end
  since = redis.call('HMGET', AGEING, unpack(fields))
  local credit, oldest = tonumber(since[1] or AGED_EVERY - 1), now() * 1000 - ageing
  for i, list in ipairs(lists) do
    list.since = tonumber(since[i + 1])
    if list.since and list.since <= oldest then aged, oldest = list, list.since end
  end
  if aged == urgent then aged = nil end
  if aged and credit < AGED_EVERY - 1 then aged = nil end
  if aged then
    redis.call('HSET', AGEING, '', 0)
  elseif credit < AGED_EVERY - 2 then
    redis.call('HSET', AGEING, '', credit + 1)
  elseif since[1] then
    redis.call('HDEL', AGEING, '')
  end
end

-- One claim is one model's batch. Idle workers share what waits; who is busy leaves their part to them.
local answer, n, taken, left = {'', default}, 2, 0, nil
local first = aged or urgent
if first then
  local model = first.model
  local room, least = wanted[model][1], wanted[model][3]
  local mine, waiting = {}, 0
  for _, list in ipairs(lists) do
    if list.model == model then
      list.size = redis.call('LLEN', list.key)
      waiting = waiting + list.size
      mine[#mine + 1] = list
    end
  end
  local others = 0
  if state == 'busy' then
    others = count_idle(group)
    room = math.min(room, waiting - others * room)
  else
    local idle = IDLE_PREFIX .. group
    redis.call('ZREM', idle, worker)
    others = count_idle(group)
    if others > 0 then room = math.min(room, math.max(least, math.ceil(waiting / (others + 1)))) end
  end

  -- One payload tells how many of its size fit. What is popped is recorded by one command: a call costs
  -- more than the field it sets.
  local function take(list, most)
    local few, before, stop, head = 1, room, math.max(0, room - most), n
    while room > stop and bytes > 0 do
      local popped = redis.call('RPOP', list.key, math.min(room - stop, few))
      if not popped then break end
      if n == head then
        answer[n + 1], answer[n + 2] = list.key, list == aged and -1 - list.rank or list.rank
        n = n + 3
      end
      local fields, k = {}, 0
      for i = 1, #popped do
        local payload, field = popped[i], string.format('%.0f', seq)
        fields[k + 1], fields[k + 2], fields[k + 3], fields[k + 4] = field, payload, field .. ':list', list.key
        answer[n + i] = payload
        k, seq, bytes = k + 4, seq + 1, bytes - #payload
      end
      for i = 1, k, 1000 do redis.call('HSET', inflight, unpack(fields, i, math.min(i + 999, k))) end
      n, room = n + #popped, room - #popped
      answer[head + 3] = before - room
      few = math.max(1, math.floor(bytes / (#popped[#popped] + 1)))
    end
    local count = before - room
    if count > 0 then
      redis.call('HINCRBY', CLAIMED, list.key, count)
      if list.turn then
        list.turn = list.turn + count
        redis.call('HSET', TURNS, list.key, list.turn)
      end
    end
    list.size = list.size - count
    list.served = list.served or count > 0
    return count
  end

  if aged then taken = take(aged, room) end
  local i = 1
  while i <= #mine and room > 0 do
    -- Those of one rank share what room there is, in parts; what one leaves is the next one's.
    local rivals = {mine[i]}
    while i < #mine and mine[i + 1].rank == rivals[1].rank do
      i = i + 1
      rivals[#rivals + 1] = mine[i]
    end
    if #rivals > 1 then
      take_turns(rivals)
      local part = math.ceil(room / #rivals)
      for _, list in ipairs(rivals) do taken = taken + take(list, part) end
    end
    for _, list in ipairs(rivals) do
      if list.size > 0 then taken = taken + take(list, room) end
    end
    i = i + 1
  end
  if top[1].turn and model == urgent.model and taken > 0 then
    redis.call('HSET', TURNS, top[1].key, top[1].turn + taken)
  end
  for _, list in ipairs(mine) do
    if list.size <= 0 then
      unindex_list(list.key, list.indexed, turn_of(list.rank, model))
    else
      left = left or list.tier
    end
  end
  if waits then
    for _, list in ipairs(lists) do
      if list.size and list.size <= 0 then
        -- Nothing waits there any more.
      elseif list.served or not list.since then
        redis.call('HSET', AGEING, list.key, string.format('%.0f', now() * 1000))
      end
    end
  end

  -- What is left is another worker's.
  if left then wake(left, model, 1) end
  for _, list in ipairs(lists) do
    if list.model ~= model then
      wake(list.tier, list.model, 1)
      break
    end
  end
end

if taken == 0 then
  if state == 'idle' then redis.call('ZADD', IDLE_PREFIX .. group, now(), worker) end
  return answer
end
-- The worker compares the id with what it reads. A payload too long to search
-- through, or a task that has its final state, is left to begin.lua.
if ARGV[5] == '1' and taken == 1 and #answer[6] <= 16384 then
  local id = id_of(answer[6])
  if id and not FINAL[state_of(id) or ''] then
    redis.call('HSET', inflight, 'running', ARGV[2])
    answer[1] = id
  end
end
return answer
