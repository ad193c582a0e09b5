-- Library: lists, their index, the order in which models are served, and waking idle workers. Needs
-- clock and places.

-- Return the name of the default model; '' when there is none. A script that has read it may set it.
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

-- Return what is counted under in CLAIMED what is claimed from a list of an index. The default model is named: should
-- another one be, what was claimed stays its own.
local function counter_of(list, index)
  if index == '' and default_model() ~= '' then return list .. ' ' .. default_model() end
  return list
end

-- Return the list of another model with the same tier, caller and priority; the default model has the lists
-- without a name.
local function list_of(list, model)
  local tier, _, rest = string.match(list, '^(%a+)%.?([^@\6]*)(.*)$')
  if model == '' or model == default_model() then return tier .. rest end
  return tier .. '.' .. model .. rest
end

-- A group of several models keeps their indices that hold work in the order of serving, so that a claim reads
-- its head alone. An index is scored by the rank of its most urgent list, and within a rank by its turn: who was
-- served least goes first. Of the indices of a group, one that another group has emptied may still be there, or
-- too far in front: the claim that finds it puts it right.
local RANK, TASK = 2 ^ 46, 64
local function rank_at(score) return math.floor(score / RANK) end
local function tier_at(rank) return TIERS[math.floor(rank / 10)] end

-- Put an index in its place in a group's order, unless it stands there, or further in front. A newcomer
-- stands behind those who wait, and keeps that place: nobody is passed over because his list was empty, or
-- was not.
local function enter_order(group, index, rank)
  if string.sub(group, 1, #ONE_MODEL) == ONE_MODEL then return end
  local order = ORDER_PREFIX .. group
  local first = rank * RANK
  local last = redis.call('ZREVRANGEBYSCORE', order, '(' .. string.format('%.0f', first + RANK), first,
    'WITHSCORES', 'LIMIT', 0, 1)
  redis.call('ZADD', order, 'LT', (last[2] or first) + 1, index)
end

-- Put an index in another place of a group's order; without a rank it has no work.
local function move_in_order(group, index, rank)
  redis.call('ZREM', ORDER_PREFIX .. group, index)
  if rank then enter_order(group, index, rank) end
end

-- Add an index to the orders of those who serve it: a list of this rank in it holds work.
local function enter_orders(tier, index, rank)
  redis.call('SADD', INDEXED, index)
  for _, group in ipairs(groups_of(tier, index == '' and default_model() or index)) do
    enter_order(group, index, rank)
  end
end

-- Add a list that holds work to its model's index, and that to the orders; `check`: to these in any case.
local function index_list(list, check)
  local tier, index, rank = place_of(list)
  if tier and (redis.pcall('ZADD', INDEX_PREFIX .. index, rank, list) == 1 or check) then
    enter_orders(tier, index, rank)
  end
  return tier, index
end

-- Drop a list that holds nothing from its model's index, and its caller's turn.
local function unindex_list(list, index)
  redis.call('ZREM', INDEX_PREFIX .. index, list)
  redis.call('HDEL', TURNS, list)
end

local idle
local function is_anybody_idle()
  if idle == nil then idle = redis.call('EXISTS', IDLE) == 1 end
  return idle
end

-- Wake up to `wanted` idle workers that serve a model (its name) in a tier, the one seen last first. One that is
-- woken counts as idle until it claims, but is not woken again.
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
      -- One that is not waiting just now keeps a single one of these.
      if redis.call('LPUSH', WAKE_PREFIX .. worker, 1) > 1 then redis.call('LTRIM', WAKE_PREFIX .. worker, 0, 0) end
      wanted = wanted - 1
    end
    if wanted <= 0 then break end
  end
end

-- Wake as many for the model of a list's index: '' is the default one.
local function wake_for(tier, indexed, wanted)
  wake(tier, indexed == '' and default_model() or indexed, wanted)
end

-- Count the workers of a group that are idle: those that wait, and those that were woken and will claim.
local function count_idle(group)
  if not is_anybody_idle() then return 0 end
  local idle = IDLE_PREFIX .. group
  return redis.call('ZCOUNT', idle, now() - IDLE_VOID, '+inf')
    + redis.call('ZCOUNT', idle, -now(), -now() + WOKEN_VOID)
end

-- Return why nothing can be appended to a list: something else stands under its name. An error of another kind is
-- raised.
local function refusal(answer)
  if type(answer) ~= 'table' then return end
  if not string.find(answer.err, 'WRONGTYPE', 1, true) then error(answer) end
  return answer.err
end

-- Put a task back at the head of its list. Returns its tier and index; and why it was not put back.
local function put_back(list, payload)
  local why = refusal(redis.pcall('RPUSH', list, payload))
  if why then return nil, nil, why end
  local _, index = place_of(list)
  redis.call('HINCRBY', CLAIMED, counter_of(list, index), -1)
  return index_list(list)
end

-- Pass a task on to the list of the model that it is for. Behind what waits there: else those that are passed on
-- in several steps would be served the last first. Returns the list's tier and index; and why it was not passed on.
local function pass_on(list, payload)
  local why = refusal(redis.pcall('LPUSH', list, payload))
  if why then return nil, nil, why end
  return index_list(list)
end
