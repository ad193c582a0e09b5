#!lua flags=allow-oom
-- needs: clock places lists
-- Report that a worker is alive, and what it serves; count the tasks that wait for it. Runs in a full Redis, too.
-- KEYS: heartbeat
-- ARGV: worker, group, heartbeat (a JSON object that is not empty, or '': none is written), tiers (space separated),
--       model to make the default if none is set yet ('' for none), then its models The heartbeat gets a first field
--       "at", the time by Redis's clock.
-- Returns how many tasks wait in its lists.
local time = redis.call('TIME')
local seconds = tonumber(time[1])
local worker, group, default_if_none = ARGV[1], ARGV[2], ARGV[5]
if ARGV[3] ~= '' then
  redis.call('SET', KEYS[1], string.format('{"at":%d.%06d,', time[1], time[2]) .. string.sub(ARGV[3], 2))
end
redis.call('ZADD', WORKERS, seconds, worker)
if default_if_none ~= '' then redis.call('SET', DEFAULT_MODEL, default_if_none, 'NX') end

-- Remove names that are no longer used: workers whose epochs were removed (forget.lua), workers that are no longer
-- idle, and groups that no worker has renewed for long.
for _, void in ipairs(redis.call('ZRANGEBYSCORE', WORKERS, '-inf', seconds - WORKER_VOID, 'LIMIT', 0, 100)) do
  if redis.call('EXISTS', INFLIGHT_PREFIX .. void) == 0 and not redis.call('HGET', EPOCH_PREFIX .. void, 'number') then
    redis.call('ZREM', WORKERS, void)
    redis.call('DEL', HEARTBEAT_PREFIX .. void)
    redis.call('DEL', WAKE_PREFIX .. void)
  end
end
redis.call('ZREMRANGEBYSCORE', IDLE_PREFIX .. group, GROUP_VOID - seconds, seconds - GROUP_VOID)
local function forget(groups, since)
  for _, void in ipairs(redis.call('ZRANGEBYSCORE', groups, '-inf', since)) do
    redis.call('ZREM', groups, void)
    -- One call per key: Redis checks a user's right to a command for all its keys together.
    redis.call('DEL', ORDER_PREFIX .. void)
    redis.call('DEL', AGEING_PREFIX .. void)
    redis.call('DEL', IDLE_PREFIX .. void)
  end
end

local waiting, best = 0, {}
for i = 6, #ARGV do
  local model = ARGV[i]
  redis.call('ZADD', CATALOGUE, seconds, model)
  for tier in string.gmatch(ARGV[4], '%a+') do
    local groups = GROUPS_PREFIX .. tier .. '.' .. model
    redis.call('ZADD', groups, seconds, group)
    forget(groups, seconds - GROUP_VOID)
  end
  for _, index in ipairs(model == default_model() and {model, ''} or {model}) do
    for _, list in ipairs(redis.pcall('ZRANGE', INDEX_PREFIX .. index, 0, -1)) do
      local tier, _, rank = place_of(list)
      if tier and string.find(ARGV[4], tier, 1, true) then
        waiting = waiting + (tonumber(redis.pcall('LLEN', list)) or 0)
        best[index] = best[index] or rank
      end
    end
  end
end
-- An empty index need not be read.
for _, index in ipairs(redis.call('SMEMBERS', INDEXED)) do
  if redis.call('EXISTS', INDEX_PREFIX .. index) == 0 then redis.call('SREM', INDEXED, index) end
end
for _, void in ipairs(redis.call('ZRANGEBYSCORE', CATALOGUE, '-inf', seconds - MODEL_VOID)) do
  for _, tier in pairs(TIERS) do forget(GROUPS_PREFIX .. tier .. '.' .. void, '+inf') end
end
redis.call('ZREMRANGEBYSCORE', CATALOGUE, '-inf', seconds - MODEL_VOID)
redis.call('ZREMRANGEBYSCORE', IDLE, '-inf', seconds - GROUP_VOID)

-- The group's order: create it for its first worker; correct it if the default model has changed.
local order = redis.call('ZRANGE', ORDER_PREFIX .. group, 0, -1)
for _, index in ipairs(order) do
  if not best[index] then redis.call('ZREM', ORDER_PREFIX .. group, index) end
end
for index, rank in pairs(best) do enter_order(group, index, rank) end
return waiting
