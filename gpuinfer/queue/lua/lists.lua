-- Library: lists, their index, the order in which models are served, and waking idle workers. Needs
-- clock and places.

-- Return the name of the default model; '' if there is none. A script that has read it already may set `default`.
local default
local function default_model()
  default = default or redis.call('GET', DEFAULT_MODEL) or ''
  return default
end

-- Return the groups of workers that serve a model (its name) in a tier.
local read = {}
local function groups_of(tier, model)
  local groups = GROUPS_PREFIX .. tier .. '.' .. model
  read[groups] = read[groups] or redis.call('ZRANGE', groups, 0, -1)
  return read[groups]
end

-- Return the field of CLAIMED for a list of an index. It includes the default model's name, so that the count stays
-- that model's if another model becomes the default.
local function counter_of(list, index)
  if index == '' and default_model() ~= '' then return list .. ' ' .. default_model() end
  return list
end

-- Return the list of another model with the same tier, caller and priority. The default model's lists have no model
-- name.
local function list_of(list, model)
  local tier, _, rest = string.match(list, '^(%a+)%.?([^@\6]*)(.*)$')
  if model == '' or model == default_model() then return tier .. rest end
  return tier .. '.' .. model .. rest
end

-- A group of several models keeps their indices that have tasks in the order of serving, so that a claim reads only the
-- head of it. An index is scored by the rank of its most urgent list, and within a rank by its turn: the one served
-- least goes first. If another group has emptied an index, it may still be in this group's order, or too far in front;
-- the claim that finds it there corrects that.
local RANK, TASK = 2 ^ 46, 64
local function rank_at(score) return math.floor(score / RANK) end
local function tier_at(rank) return TIERS[math.floor(rank / 10)] end

-- Put an index into a group's order, unless it is already at this place, or further in front. A new index goes behind
-- the others of its rank, and keeps that place: a model gains or loses nothing because its lists were empty before.
local function enter_order(group, index, rank)
  if string.sub(group, 1, #ONE_MODEL) == ONE_MODEL then return end
  local order = ORDER_PREFIX .. group
  local first = rank * RANK
  local last = redis.call('ZREVRANGEBYSCORE', order, '(' .. string.format('%.0f', first + RANK), first,
    'WITHSCORES', 'LIMIT', 0, 1)
  redis.call('ZADD', order, 'LT', (last[2] or first) + 1, index)
end

-- Move an index to another place in a group's order; without a rank it has no tasks, and is removed.
local function move_in_order(group, index, rank)
  redis.call('ZREM', ORDER_PREFIX .. group, index)
  if rank then enter_order(group, index, rank) end
end

-- Add an index to the orders of the groups that serve it, because one of its lists, of this rank, has tasks.
local function enter_orders(tier, index, rank)
  redis.call('SADD', INDEXED, index)
  for _, group in ipairs(groups_of(tier, index == '' and default_model() or index)) do
    enter_order(group, index, rank)
  end
end

-- Add a list that has tasks to its model's index, and the index to the orders if the list is new there, or with
-- `check`.
local function index_list(list, check)
  local tier, index, rank = place_of(list)
  if tier and (redis.pcall('ZADD', INDEX_PREFIX .. index, rank, list) == 1 or check) then
    enter_orders(tier, index, rank)
  end
  return tier, index
end

-- Remove an empty list from its model's index, and its turn.
local function unindex_list(list, index)
  redis.call('ZREM', INDEX_PREFIX .. index, list)
  redis.call('HDEL', TURNS, list)
end

-- Tell whether any worker of any group is idle; if not, there is no need to count or search idle workers.
local idle
local function is_anybody_idle()
  if idle == nil then idle = redis.call('EXISTS', IDLE) == 1 end
  return idle
end

-- Wake up to `wanted` idle workers that serve a model (its name) in a tier, the most recently seen first. A woken
-- worker counts as idle until it claims, but is not woken again.
local nobody = {}
local function wake(tier, model, wanted)
  if not is_anybody_idle() then return end
  for _, group in ipairs(groups_of(tier, model)) do
    local idle = IDLE_PREFIX .. group
    local workers = nobody[group] and {} or redis.call('ZREVRANGE', idle, 0, wanted - 1, 'WITHSCORES')
    nobody[group] = #workers == 0
    for i = 1, #workers, 2 do
      local worker, at = workers[i], tonumber(workers[i + 1])
      if at < 0 or at < now() - IDLE_VOID then break end
      redis.call('ZADD', idle, -now(), worker)
      -- Keep only one entry if the worker is not waiting at the moment.
      if redis.call('LPUSH', WAKE_PREFIX .. worker, 1) > 1 then redis.call('LTRIM', WAKE_PREFIX .. worker, 0, 0) end
      wanted = wanted - 1
    end
    if wanted <= 0 then break end
  end
end

-- Do the same, given the model of an index: '' is the default model.
local function wake_for(tier, indexed, wanted)
  wake(tier, indexed == '' and default_model() or indexed, wanted)
end

-- Count the idle workers of a group: those that wait, and those that were woken but have not claimed yet.
local function count_idle(group)
  if not is_anybody_idle() then return 0 end
  local idle = IDLE_PREFIX .. group
  return redis.call('ZCOUNT', idle, now() - IDLE_VOID, '+inf')
    + redis.call('ZCOUNT', idle, -now(), -now() + WOKEN_VOID)
end

-- Return the error text if a list's key has another type; nothing for success. Raises any other error.
local function refusal(answer)
  if type(answer) ~= 'table' then return end
  if not string.find(answer.err, 'WRONGTYPE', 1, true) then error(answer) end
  return answer.err
end

-- Put a task back at the head of its list. Returns its tier and index; or nil, nil and why it was not put back.
local function put_back(list, payload)
  local why = refusal(redis.pcall('RPUSH', list, payload))
  if why then return nil, nil, why end
  local _, index = place_of(list)
  redis.call('HINCRBY', CLAIMED, counter_of(list, index), -1)
  return index_list(list)
end

-- Append a task to the list of the model that it is for. At the end, because tasks that are passed on in several steps
-- must keep their order. Returns the list's tier and index; or nil, nil and why it was not passed on.
local function pass_on(list, payload)
  local why = refusal(redis.pcall('LPUSH', list, payload))
  if why then return nil, nil, why end
  return index_list(list)
end
