#!lua flags=allow-oom
-- Say what a worker serves, also when Redis is full, and that it lives; count what waits for it.
-- KEYS: heartbeat
-- ARGV: worker, group, heartbeat (a JSON object that is not empty, or '': none is written), tiers (space
--       separated), the default model where none is set yet ('' for none), then its models
-- The time by Redis's clock is put in front of the heartbeat, as "at".
-- Returns how many tasks wait in its lists.
local time = redis.call('TIME')
local now = tonumber(time[1])
if ARGV[3] ~= '' then
  redis.call('SET', KEYS[1], string.format('{"at":%d.%06d,', time[1], time[2]) .. string.sub(ARGV[3], 2))
end
redis.call('ZADD', WORKERS, now, ARGV[1])
if ARGV[5] ~= '' then redis.call('SET', DEFAULT_MODEL, ARGV[5], 'NX') end
local default = redis.call('GET', DEFAULT_MODEL)
local waiting = 0
for i = 6, #ARGV do
  local model = ARGV[i]
  redis.call('ZADD', CATALOGUE, now, model)
  for tier in string.gmatch(ARGV[4], '%a+') do
    local groups = GROUPS_PREFIX .. tier .. '.' .. model
    redis.call('ZADD', groups, now, ARGV[2])
    redis.call('ZREMRANGEBYSCORE', groups, '-inf', now - GROUP_VOID)
  end
  for _, index in ipairs(model == default and {model, ''} or {model}) do
    for _, list in ipairs(redis.call('ZRANGE', INDEX_PREFIX .. index, 0, -1)) do
      if string.find(ARGV[4], string.match(list, '^%a+'), 1, true) then
        waiting = waiting + redis.call('LLEN', list)
      end
    end
  end
end
redis.call('ZREMRANGEBYSCORE', CATALOGUE, '-inf', now - MODEL_VOID)
return waiting
