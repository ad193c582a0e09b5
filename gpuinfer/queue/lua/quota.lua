-- Library: the limits of one caller. Needs clock and places. A quota is: tasks per second (0: no limit), tasks at once,
-- maximum waiting tasks, maximum bytes of these (0: no limit).

-- The rate limit is a generic cell rate algorithm (ITU-T I.371, annex A): the only data kept of a caller is when its
-- next task would be due at exactly its rate. A task may come before it is due, by the length of a burst. Return why
-- not all of `count` tasks are accepted; or nil and a function that charges them, and returns its argument with the
-- state of the rate limit. If the clock was set back, or the quota was lowered, the caller is locked out for at most
-- the length of a burst.
local function meter(caller, quota, count)
  local rate, burst = string.match(quota, '^(%S+) (%S+)')
  rate, burst = tonumber(rate), tonumber(burst)
  if rate == 0 then return end
  local at, span = now(), burst / rate
  local due = tonumber(redis.call('HGET', RATES, caller) or 0)
  due = math.max(at, math.min(due, at + span))
  -- A millionth of a task is added against rounding errors.
  local fit = math.floor(burst - (due - at) * rate + 0.000001)
  if count > fit then
    fit = math.max(fit, 0)
    local wait = math.max(due + (fit + 1) / rate - span - at, 0)
    return string.format('RATE_LIMITED %d %.6f %.6f %.12g %d', fit, wait, due + fit / rate - at, rate, burst)
  end
  due = due + count / rate
  return nil, function(id)
    redis.call('HSET', RATES, caller, string.format('%.6f', due))
    return {id, math.floor(burst - (due - at) * rate + 0.000001), string.format('%.6f', due - at)}
  end
end

-- Return how many tasks of a caller wait, including those with an ETA; their bytes, including large bodies; and the
-- number of queues that were checked.
local function count_own(caller)
  local models, tasks, bytes, looked = {[''] = true}, 0, 0, 0
  for _, model in ipairs(redis.call('ZRANGE', CATALOGUE, 0, -1)) do models[model] = true end
  for _, model in ipairs(redis.call('SMEMBERS', INDEXED)) do models[model] = true end
  local function count(key, size)
    if type(size) ~= 'number' or size == 0 then return end
    local used = redis.pcall('MEMORY', 'USAGE', key, 'SAMPLES', 1000)
    tasks, bytes = tasks + size, bytes + (tonumber(used) or 0)
  end
  for model in pairs(models) do
    for tier in pairs(BASE) do
      local queue = (model == '' and tier or tier .. '.' .. model) .. '@' .. caller
      local urgent = {}
      for priority = 1, 9 do urgent[priority] = queue .. SEP .. priority end
      looked = looked + 1
      if redis.call('EXISTS', queue, unpack(urgent)) > 0 then
        count(queue, redis.pcall('LLEN', queue))
        for _, list in ipairs(urgent) do count(list, redis.pcall('LLEN', list)) end
      end
    end
  end
  for _, list in ipairs(redis.call('ZRANGE', LATER, 0, -1)) do
    if string.match(list, '@([^@\6]+)') == caller then
      local set = LATER_PREFIX .. list
      count(set, redis.pcall('ZCARD', set))
    end
  end
  return tasks, bytes + (redis.call('HGET', BODY_BYTES, '@' .. caller) or 0), looked
end

-- Take room for `count` tasks of `size` bytes within a caller's limits, as room.lua does for all callers: if the last
-- grant is used up, the waiting tasks are counted, and half of the room left is granted. Returns why there is no room,
-- or nothing.
local function grant_key_room(caller, quota, count, size)
  local most, most_bytes = string.match(quota, '(%d+) (%d+)$')
  if most == '0' and most_bytes == '0' then return end
  local field = '@' .. caller .. ' ' .. most .. ' ' .. most_bytes
  if redis.call('HINCRBY', ROOM, field, -(count + math.floor(size / GRANT_BYTES))) >= 0 then return end
  local told = redis.call('HGET', ROOM, '@' .. caller)
  if told then
    local at, why = string.match(told, '^(%S+) (.*)$')
    if math.abs(now() - at) < 0.1 then return why end
  end
  local tasks, bytes, looked = count_own(caller)
  local left = (most == '0' and math.huge or tonumber(most)) - tasks
  local left_bytes = (most_bytes == '0' and math.huge or tonumber(most_bytes)) - bytes
  local why
  if count > left then
    why = string.format('KEY_FULL tasks %d %s', math.max(left, 0), most)
  elseif size > left_bytes then
    why = 'KEY_FULL bytes ' .. most_bytes
  end
  -- If counting takes long and there is no room at all, calls in the next 0.1 s are refused without counting.
  if why and looked > 15 and (left <= 0 or left_bytes <= 0) then
    redis.call('HSET', ROOM, '@' .. caller, string.format('%.6f %s', now(), why))
  end
  if why then return why end
  local granted = math.min(left - count, (left_bytes - size) / GRANT_BYTES, 1e9) / 2
  redis.call('HSET', ROOM, field, string.format('%.0f', math.floor(granted)))
end
