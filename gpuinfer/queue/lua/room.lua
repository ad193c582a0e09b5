-- Library: the limits of waiting tasks. Needs places. The waiting tasks are counted exactly, which takes some time.
-- Half of the room left is then granted: that many tasks may be submitted before the next count. No counter goes up and
-- down, so none can drift when plain producers fill the lists. A grant is a number of tasks of up to GRANT_BYTES each;
-- a larger task takes several.

-- Counting more bytes than this takes longer than a submission.
local MANY_BYTES = 16000000

-- Return the number of waiting tasks, the bytes of those in the tier batch, the bytes of all, and the number of lists.
local function count_waiting()
  local seen, tasks, batch, all, lists = {}, 0, 0, 0, 0
  local function weigh(list, key)
    -- Exact up to about 160 MB of small tasks; beyond that, the size is extrapolated from the sampled nodes.
    local bytes = redis.pcall('MEMORY', 'USAGE', key, 'SAMPLES', 20000)
    if type(bytes) ~= 'number' then return end
    all = all + bytes
    if string.sub(list, 1, 5) == 'batch' then batch = batch + bytes end
  end
  local function count(list)
    if seen[list] then return end
    seen[list] = true
    local size = redis.pcall('LLEN', list)
    if type(size) == 'table' or size == 0 then return end
    tasks, lists = tasks + size, lists + 1
    weigh(list, list)
  end
  local models = {[''] = true}
  for _, model in ipairs(redis.call('ZRANGE', CATALOGUE, 0, -1)) do models[model] = true end
  for _, model in ipairs(redis.call('SMEMBERS', INDEXED)) do models[model] = true end
  for model in pairs(models) do
    for _, list in ipairs(redis.pcall('ZRANGE', INDEX_PREFIX .. model, 0, -1)) do count(list) end
    -- Lists that plain producers may have filled.
    for tier in pairs(BASE) do
      local queue = model == '' and tier or tier .. '.' .. model
      local urgent = {}
      for priority = 1, 9 do urgent[priority] = queue .. SEP .. priority end
      if redis.call('EXISTS', queue, unpack(urgent)) > 0 then
        count(queue)
        for _, list in ipairs(urgent) do count(list) end
      end
    end
  end
  for _, list in ipairs(redis.call('ZRANGE', LATER, 0, -1)) do weigh(list, LATER_PREFIX .. list) end
  local bodies = redis.call('HGETALL', BODY_BYTES)
  for i = 1, #bodies, 2 do
    if BASE[bodies[i]] then all = all + bodies[i + 1] end -- the others are callers'
    if bodies[i] == 'batch' then batch = batch + bodies[i + 1] end
  end
  return tasks, batch, all, lists
end

-- Take room for `count` tasks of `size` bytes after the last grant is used up, and grant more. `limits`: maximum
-- waiting tasks and bytes (0: half of the memory); the tier batch may use half of the bytes. Returns why there is no
-- room, or nothing.
local function grant_room(tier, count, size, limits, field)
  local told = redis.call('HGET', ROOM, 'full ' .. field)
  if told then
    local at, why = string.match(told, '^(%S+) (.*)$')
    if math.abs(now() - at) < 0.1 then return why end
  end
  local most, most_bytes = string.match(limits, '^(%d+) (%d+)$')
  most, most_bytes = tonumber(most), tonumber(most_bytes)
  if most_bytes == 0 then
    local memory = tonumber(string.match(redis.call('INFO', 'memory'), 'maxmemory:(%d+)'))
    most_bytes = memory > 0 and memory / 2 or math.huge
  end
  local tasks, batch, all, lists = count_waiting()
  local left = most_bytes - all
  if tier == 'batch' then left = math.min(left, most_bytes / 2 - batch) end
  local why
  if count > most - tasks then
    why = 'tasks ' .. most
  elseif size > left then
    why = string.format('%s %.0f', tier == 'batch' and 'bytes-of-batch' or 'bytes', most_bytes)
  end
  -- If counting takes long and there is no room at all, calls in the next 0.1 s are refused without counting.
  if why and (all > MANY_BYTES or lists > 100) and (tasks >= most or left < GRANT_BYTES) then
    redis.call('HSET', ROOM, 'full ' .. field, string.format('%.6f %s', now(), why))
  end
  if why then return why end
  local granted = math.min(most - tasks - count, (left - size) / GRANT_BYTES, 1e9) / 2
  redis.call('HSET', ROOM, field, string.format('%.0f', math.floor(granted)))
end
