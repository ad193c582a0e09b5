#!lua flags=allow-oom
-- needs: clock places lists
-- Pop up to N tasks of one model, the most urgent first, and record them as in flight, in one step.
-- KEYS: in-flight hash, epoch hash
-- ARGV: 1 epoch, 2 first sequence id to use, 3 maximum bytes of payload (one task is taken even if it is larger),
--       4 ageing in milliseconds (0: off), 5 '1': a single task will run at once, so note it as begin.lua does,
--       6 the worker's state: 'idle' (list it as idle if nothing is found), 'free' (nothing runs), 'busy' (leave
--       idle workers their share), 7 worker, 8 group, 9 tiers (space separated), 10 the default model if the worker
--       knows that it serves it, 11 number of lists to check, because plain producers may have filled them, then
--       these lists; then the wants: number of tasks, a rank that theirs must be below, least batch, number of models
--       (0: all others), these models
-- Returns {id of the task noted as running or '', the default model, then for each list: list, rank (-1 - rank: it was
-- aged and went first), number of payloads, the payloads}. Sequence ids count up from the first. Payloads are not
-- parsed.
local inflight = KEYS[1]
local epoch, seq, bytes, ageing = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local state, worker, group = ARGV[6], ARGV[7], ARGV[8]

-- Refuse a claim of an earlier epoch: it was delayed, or another process has taken over the worker's name, and nobody
-- would know of the tasks. A Redis that has lost its last writes may have a lower number than the worker.
local counted = tonumber(redis.call('HGET', KEYS[2], 'number') or 0)
if counted > epoch then return redis.error_reply('STALE claim of epoch ' .. epoch .. ', now is ' .. counted) end
if counted < epoch then redis.call('HSET', KEYS[2], 'number', epoch) end

local found = redis.call('MGET', DEFAULT_MODEL, AGED_PREFIX .. group, PAUSED, DUE, DRAINED)
default = found[1] or ''
if found[5] and string.find(' ' .. found[5] .. ' ', ' ' .. worker .. ' ', 1, true) then
  -- A drained worker is not woken, and gets no share.
  redis.call('ZREM', IDLE, worker)
  redis.call('ZREM', IDLE_PREFIX .. group, worker)
  return {'', default}
end
local packed, paused, due = found[2], nil, found[4]
if found[3] then
  paused = {}
  for name in string.gmatch(found[3], '%S+') do paused[name] = true end
end
if due and tonumber(due) <= now() then
  -- needs: later
  move_due(100, 262144)
end
local function is_served(tier) return tier and string.find(ARGV[9], tier, 1, true) end
local wants_at = 12 + ARGV[11]
for i = 12, wants_at - 1 do
  local size = redis.pcall('LLEN', ARGV[i])
  if type(size) == 'number' and size > 0 then index_list(ARGV[i], true) end
end

-- Return the model of an index; nil if the group does not serve it.
local function model_of(index)
  if index ~= '' then return index end
  if default == ARGV[10] then return default end
  local tier = string.match(ARGV[9], '^%a+')
  return redis.call('ZSCORE', GROUPS_PREFIX .. tier .. '.' .. default, group) and default or nil
end

-- Return what the worker wants of an index's model (number of tasks, bound of their rank, least batch), and the model.
-- Nil: nothing.
local function want_of(index)
  local model, at = model_of(index), wants_at
  while model do
    local last = at + 3 + ARGV[at + 3]
    local meant = last == at + 3
    for i = at + 4, last do
      if ARGV[i] == model then
        meant = true
        break
      end
    end
    if meant then
      local count = tonumber(ARGV[at])
      if count == 0 then return nil end
      return {count = count, bound = tonumber(ARGV[at + 1]), least = tonumber(ARGV[at + 2])}, model
    end
    at = last + 1
  end
end

-- Return the lists of a model (its name) that have tasks, in the order of serving. Paused lists are left out, and so is
-- an index key of another type.
local function lists_of(model)
  local named, flat = INDEX_PREFIX .. model, nil
  if model == default then
    flat = redis.call('EXISTS', named) == 1 and redis.pcall('ZUNION', 2, INDEX_PREFIX, named, 'WITHSCORES')
    if not flat or flat.err then flat = redis.pcall('ZRANGE', INDEX_PREFIX, 0, -1, 'WITHSCORES') end
  end
  if not flat or flat.err then flat = redis.pcall('ZRANGE', named, 0, -1, 'WITHSCORES') end
  local lists = {}
  for i = 1, #flat, 2 do
    local key, rank = flat[i], tonumber(flat[i + 1])
    local tier = tier_at(rank)
    if is_served(tier) and not (paused and (paused[tier] or paused[tier .. '.' .. model])) then
      local index = model == default and string.match(key, '^%a+%.?([^@\6]*)') or model
      lists[#lists + 1] = {key = key, rank = rank, index = index}
    end
  end
  return lists
end

-- Return the rank of the first list of an index that is not known to be empty; nil if there is none.
local function rank_of(lists, index)
  for _, list in ipairs(lists) do
    if list.index == index and (not list.size or list.size > 0) then return list.rank end
  end
end

-- Callers of a model take turns as models do: the one served least, relative to its weight, goes first. Sorts `rivals`
-- in this order; returns the sum of their weights.
local function take_turns(rivals)
  local names, callers, most, new, total = {}, {}, 0, {}, 0
  for i, one in ipairs(rivals) do
    names[i], callers[i] = one.key, string.match(one.key, '@([^\6]*)') or ''
  end
  for first = 1, #names, 1000 do
    local last = math.min(first + 999, #names)
    local turns = redis.call('HMGET', TURNS, unpack(names, first, last))
    local weights = redis.call('HMGET', WEIGHTS, unpack(callers, first, last))
    for i = first, last do
      local turn, weight = tonumber(turns[i - first + 1]), tonumber(weights[i - first + 1] or 1)
      rivals[i].turn, rivals[i].weight = turn, weight and weight > 0 and weight or 1
      total = total + rivals[i].weight
      if turn and turn > most then most = turn end
    end
  end
  for _, one in ipairs(rivals) do
    one.new = one.turn and 0 or 1
    if not one.turn then
      one.turn, new[#new + 1], new[#new + 2] = most, one.key, most
    end
  end
  for first = 1, #new, 1000 do redis.call('HSET', TURNS, unpack(new, first, math.min(first + 999, #new))) end
  table.sort(rivals, function(a, b)
    if a.turn ~= b.turn then return a.turn < b.turn end
    if a.new ~= b.new then return a.new < b.new end
    return a.key < b.key
  end)
  return total
end

-- Return the answer of a claim that took no tasks.
local function nothing()
  if state == 'idle' then
    redis.call('ZADD', IDLE, now(), worker)
    redis.call('ZADD', IDLE_PREFIX .. group, now(), worker)
    idle = true
  end
  return {'', default}
end

-- Choose the model that goes first, with its lists: the first in the group's order that the worker wants, or a group's
-- only model.
local model, want, lists, index, rank, heads, rivals = nil, nil, {}, nil, nil, {}, nil
if string.sub(group, 1, #ONE_MODEL) == ONE_MODEL then
  model = ARGV[wants_at + 4]
  want = want_of(model)
  if want then lists = lists_of(model) end
else
  local function head(last) return redis.call('ZRANGE', ORDER_PREFIX .. group, 0, last, 'WITHSCORES') end
  local last, i = 1, 1
  heads = head(last)
  while heads[i] and not model do
    local name
    index, rank = heads[i], rank_at(heads[i + 1])
    want, name = want_of(index)
    if want and rank < want.bound then
      lists = lists_of(name)
      local best = rank_of(lists, index)
      if best == rank then
        model = name
        rivals = (i > 1 or heads[4] and rank_at(heads[4]) == rank) and tonumber(heads[i + 1])
      else
        move_in_order(group, index, best)
        i, heads = 1, head(last)
      end
    else
      i = i + 2
      if i == 5 and last == 1 then
        last = -1
        heads = head(last)
      end
    end
  end
end
local urgent = lists[1]
if not model or not urgent or urgent.rank >= want.bound then return nothing() end

-- Ageing: a list that was passed over for too long goes first once; this happens in at most every fifth claim.
local aged
if ageing > 0 and (#lists > 1 or heads[3]) then
  if not packed then
    -- needs: ageing
    local keys = {}
    if heads[1] then
      local indices = redis.call('ZRANGE', ORDER_PREFIX .. group, 0, 999)
      local n = #indices
      for i, name in ipairs(indices) do indices[i] = INDEX_PREFIX .. name end
      for _, key in ipairs(redis.call('ZUNION', n, unpack(indices))) do
        if is_served(string.match(key, '^%a+')) then keys[#keys + 1] = key end
      end
    else
      for i, list in ipairs(lists) do keys[i] = list.key end
    end
    packed = look_for_aged(group, keys, ageing)
  end
  local since = AGEING_PREFIX .. group
  local credit = packed ~= '' and redis.call('HGET', since, '')
  if packed ~= '' and tonumber(credit or AGED_EVERY - 1) >= AGED_EVERY - 1 then
    local waiting = cmsgpack.unpack(packed)
    for i, key in ipairs(waiting) do
      local _, of, place = place_of(key)
      local wanted, name = want_of(of)
      if key ~= urgent.key and wanted and place < wanted.bound then
        local theirs = name == model and lists or lists_of(name)
        for _, list in ipairs(theirs) do
          if list.key == key then aged, lists, model, want = list, theirs, name, wanted end
        end
        if aged then
          table.remove(waiting, i)
          packed = #waiting > 0 and cmsgpack.pack(waiting) or ''
          redis.call('SET', AGED_PREFIX .. group, packed, 'XX', 'KEEPTTL')
          break
        end
      end
    end
  end
  if aged then
    redis.call('HSET', since, '', 0)
  elseif credit then
    if tonumber(credit) < AGED_EVERY - 2 then
      redis.call('HINCRBY', since, '', 1)
    else
      redis.call('HDEL', since, '')
    end
  end
end

-- A claim takes tasks of one model, for one batch. Idle workers share the waiting tasks; a busy worker leaves them
-- theirs.
local answer, n, taken = {'', default}, 2, 0
local room, waiting, mine = want.count, 0, {}
for _, list in ipairs(lists) do
  if list.rank < want.bound then
    local size = redis.pcall('LLEN', list.key)
    list.size = type(size) == 'number' and size or 0
    waiting = waiting + list.size
    mine[#mine + 1] = list
  end
end
if state == 'busy' then
  room = math.min(room, waiting - count_idle(group) * room)
else
  if is_anybody_idle() and redis.call('ZREM', IDLE, worker) == 1 then
    redis.call('ZREM', IDLE_PREFIX .. group, worker)
    idle = nil
  end
  local others = count_idle(group)
  if others > 0 then room = math.min(room, math.max(want.least, math.ceil(waiting / (others + 1)))) end
end

-- Pop the first payload alone: its size tells how many fit. All that is popped at once is recorded by one command,
-- because a command costs more than the fields that it sets.
local function take(list, most)
  local few, before, stop, head = 1, room, math.max(0, room - math.min(most, list.size)), n
  while room > stop and bytes > 0 do
    local popped = redis.pcall('RPOP', list.key, math.min(room - stop, few))
    if not popped or popped.err then break end
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
    redis.call('HINCRBY', CLAIMED, counter_of(list.key, list.index), count)
    if list.turn then
      list.turn = list.turn + count / list.weight
      redis.call('HSET', TURNS, list.key, list.turn)
    end
  end
  list.size = list.size - count
  list.served = list.served or count > 0
  return count
end

if aged then taken = take(aged, room) end
local at = 1
while at <= #mine and room > 0 do
  -- Callers' lists of one rank share the room by weight. The next lists get what one leaves.
  local callers = {mine[at]}
  while at < #mine and mine[at + 1].rank == callers[1].rank do
    at = at + 1
    callers[#callers + 1] = mine[at]
  end
  if #callers > 1 then
    local part = room / take_turns(callers)
    for _, list in ipairs(callers) do taken = taken + take(list, math.ceil(part * list.weight)) end
  end
  for _, list in ipairs(callers) do
    if list.size > 0 then taken = taken + take(list, room) end
  end
  at = at + 1
end

-- Update the index and the order, and wake other workers for the tasks that are left, of this model or the next.
local before, left = {}, nil
for _, list in ipairs(lists) do before[list.index] = before[list.index] or list.rank end
for _, list in ipairs(mine) do
  if list.size <= 0 then
    unindex_list(list.key, list.index)
  else
    left = left or list.rank
  end
end
for name, first in pairs(before) do
  local best = rank_of(lists, name)
  if best ~= first then
    if heads[1] then move_in_order(group, name, best) end
  elseif rivals and name == index and taken > 0 then
    redis.call('ZADD', ORDER_PREFIX .. group, rivals + taken * TASK, name)
  end
end
-- This may wake this worker itself, too: an index that turned out empty may have hidden another model's tasks from it.
local none = taken == 0 and nothing()
if left then wake(tier_at(left), model, 1) end
for i = 1, #heads, 2 do
  local name = heads[i] == '' and default or heads[i]
  if name ~= model then
    wake(tier_at(rank_at(heads[i + 1])), name, 1)
    break
  end
end

if none then return none end
-- The worker compares this id with the one that it reads from the message. A payload that is too long to search, or a
-- task that has a final state, is left to begin.lua.
if ARGV[5] == '1' and taken == 1 and #answer[6] <= 16384 then
  -- needs: states payload
  local id = id_of(answer[6])
  if id and not FINAL[state_of(id) or ''] then
    redis.call('HSET', inflight, 'running', ARGV[2])
    answer[1] = id
  end
end
return answer
