-- Library: lists and their index, and waking idle workers.
local SEP = '\6\22'
local BASE = {realtime = 0, default = 10, batch = 20}

-- Return a list's tier, model ('' for the default one) and rank; nil when its name is not ours.
local function place_of(list)
  local tier, model, caller, priority = string.match(list, '^(%a+)([^@\6]*)([^\6]*)(.*)$')
  local base = BASE[tier or '']
  if not base or model ~= '' and not string.find(model, '^%.[a-z0-9][a-z0-9_.-]*$') then return end
  if caller ~= '' and not string.find(caller, '^@[^@\22]+$') then return end
  if priority ~= '' then priority = string.match(priority, '^\6\22(%d)$') end
  if priority then return tier, string.sub(model, 2), base + 9 - (tonumber(priority) or 0) end
end

-- Return the list of another model with the same tier, caller and priority; the default model has the lists
-- without a name.
local function list_of(list, model)
  local tier, _, rest = string.match(list, '^(%a+)%.?([^@\6]*)(.*)$')
  if model == '' or model == redis.call('GET', DEFAULT_MODEL) then return tier .. rest end
  return tier .. '.' .. model .. rest
end

-- Add a list that holds work to its model's index.
local function index_list(list)
  local tier, model, rank = place_of(list)
  if tier and redis.call('ZADD', INDEX_PREFIX .. model, rank, list) == 1 then
    redis.call('SADD', INDEXED, model)
  end
  return tier, model
end

-- Return what a model's turn among those with work of one rank is kept under; no list has such a name.
local function turn_of(rank, model) return rank .. ' ' .. model end

-- Drop a list that holds nothing from its model's index. It has waited for nothing, and neither it nor its model,
-- whose turn is given, has one.
local function unindex_list(list, model, turn)
  redis.call('ZREM', INDEX_PREFIX .. model, list)
  redis.call('HDEL', AGEING, list)
  redis.call('HDEL', TURNS, list, turn)
end

local clock
local function now()
  if not clock then
    local time = redis.call('TIME')
    clock = time[1] + time[2] / 1000000
  end
  return clock
end

-- Wake up to `wanted` idle workers that serve a model (its name) in a tier, the one seen last first. One that is
-- woken counts as idle until it claims, but is not woken again.
local function wake(tier, model, wanted)
  for _, group in ipairs(redis.call('ZRANGE', GROUPS_PREFIX .. tier .. '.' .. model, 0, -1)) do
    local idle = IDLE_PREFIX .. group
    local workers = redis.call('ZREVRANGE', idle, 0, wanted - 1, 'WITHSCORES')
    for i = 1, #workers, 2 do
      local worker, at = workers[i], tonumber(workers[i + 1])
      if at < 0 or at < now() - IDLE_VOID then break end
      redis.call('ZADD', idle, -now(), worker)
      redis.call('LPUSH', WAKE_PREFIX .. worker, 1)
      redis.call('LTRIM', WAKE_PREFIX .. worker, 0, 0)
      wanted = wanted - 1
    end
    if wanted <= 0 then break end
  end
end

-- Wake as many for the model of a list's index: '' is the default one.
local function wake_for(tier, indexed, wanted)
  wake(tier, indexed == '' and redis.call('GET', DEFAULT_MODEL) or indexed, wanted)
end

-- Count the workers of a group that are idle: those that wait, and those that were woken and will claim.
local function count_idle(group)
  local idle = IDLE_PREFIX .. group
  if redis.call('EXISTS', idle) == 0 then return 0 end
  return redis.call('ZCOUNT', idle, now() - IDLE_VOID, '+inf')
    + redis.call('ZCOUNT', idle, -now(), -now() + WOKEN_VOID)
end

-- Put a task back at the head of its list.
local function put_back(list, payload)
  redis.call('RPUSH', list, payload)
  redis.call('HINCRBY', CLAIMED, list, -1)
  return index_list(list)
end

-- Pass a task on to the list of the model that it is for. Behind what waits there: else those that are passed on
-- in several steps would be served the last first.
local function pass_on(list, payload)
  redis.call('LPUSH', list, payload)
  return index_list(list)
end
