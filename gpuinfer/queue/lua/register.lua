#!lua flags=allow-oom
-- needs: lists
-- Say what a worker serves, also when Redis is full, and that it lives; count what waits for it.
-- KEYS: heartbeat
-- ARGV: worker, group, heartbeat (a JSON object that is not empty, or '': none is written), tiers (space
--       separated), the default model where none is set yet ('' for none), then its models
-- The time by Redis's clock is put in front of the heartbeat, as "at".
-- Returns how many tasks wait in its lists.
local time = redis.call('TIME')
local seconds = tonumber(time[1])
local worker, group, default_if_none = ARGV[1], ARGV[2], ARGV[5]
if ARGV[3] ~= '' then
  redis.call('SET', KEYS[1], string.format('{"at":%d.%06d,', time[1], time[2]) .. string.sub(ARGV[3], 2))
end
redis.call('ZADD', WORKERS, seconds, worker)
if default_if_none ~= '' then redis.call('SET', DEFAULT_MODEL, default_if_none, 'NX') end

-- Forget groups that nobody has renewed for long.
local function forget(groups)
  for _, void in ipairs(redis.call('ZRANGEBYSCORE', groups, '-inf', seconds - GROUP_VOID)) do
    redis.call('ZREM', groups, void)
    redis.call('DEL', ORDER_PREFIX .. void, AGEING_PREFIX .. void)
  end
end

local waiting, best = 0, {}
for i = 6, #ARGV do
  local model = ARGV[i]
  redis.call('ZADD', CATALOGUE, seconds, model)
  for tier in string.gmatch(ARGV[4], '%a+') do
    local groups = GROUPS_PREFIX .. tier .. '.' .. model
    redis.call('ZADD', groups, seconds, group)
    forget(groups)
  end
  for _, index in ipairs(model == default_model() and {model, ''} or {model}) do
    for _, list in ipairs(redis.call('ZRANGE', INDEX_PREFIX .. index, 0, -1)) do
      local tier, _, rank = place_of(list)
      if tier and string.find(ARGV[4], tier, 1, true) then
        waiting = waiting + redis.call('LLEN', list)
        best[index] = best[index] or rank
      end
    end
  end
end
-- An index that is empty needs no look.
for _, index in ipairs(redis.call('SMEMBERS', INDEXED)) do
  if redis.call('EXISTS', INDEX_PREFIX .. index) == 0 then redis.call('SREM', INDEXED, index) end
end
redis.call('ZREMRANGEBYSCORE', CATALOGUE, '-inf', seconds - MODEL_VOID)
redis.call('ZREMRANGEBYSCORE', IDLE, '-inf', seconds - GROUP_VOID)

-- The group's order: begun with its first worker, and put right where the default model has changed.
local order = redis.call('ZRANGE', ORDER_PREFIX .. group, 0, -1)
for _, index in ipairs(order) do
  if not best[index] then redis.call('ZREM', ORDER_PREFIX .. group, index) end
end
for index, rank in pairs(best) do enter_order(group, index, rank) end
return waiting
