-- Library: how much may wait. Needs places.
-- What waits is counted exactly, which takes some time, and half of the room that is found is granted: so much may
-- come before the next count. Nothing is counted up and down, so that nothing drifts, whoever fills the lists.
-- A grant is a number of tasks, of GRANT_BYTES each at most: a larger one takes several.

-- Return how many tasks wait, the bytes of those of the tier batch, and those of all.
local function count_waiting()
  local seen, tasks, batch, all = {}, 0, 0, 0
  local function count(list)
    if seen[list] then return end
    seen[list] = true
    local size = redis.pcall('LLEN', list)
    if type(size) == 'table' or size == 0 then return end
    local bytes = redis.call('MEMORY', 'USAGE', list)
    tasks, all = tasks + size, all + bytes
    if string.sub(list, 1, 5) == 'batch' then batch = batch + bytes end
  end
  local models = {[''] = true}
  for _, model in ipairs(redis.call('ZRANGE', CATALOGUE, 0, -1)) do models[model] = true end
  for _, model in ipairs(redis.call('SMEMBERS', INDEXED)) do models[model] = true end
  for model in pairs(models) do
    for _, list in ipairs(redis.pcall('ZRANGE', INDEX_PREFIX .. model, 0, -1)) do count(list) end
    for tier in pairs(BASE) do
      -- What plain producers may have filled.
      local queue = model == '' and tier or tier .. '.' .. model
      for priority = 0, 9 do count(priority == 0 and queue or queue .. SEP .. priority) end
    end
  end
  local bodies = redis.call('HGETALL', BODY_BYTES)
  for i = 1, #bodies, 2 do
    all = all + bodies[i + 1]
    if bodies[i] == 'batch' then batch = batch + bodies[i + 1] end
  end
  return tasks, batch, all
end

-- Take room for `count` tasks of `size` bytes where the last grant is used up, and grant more. `limits`: how many
-- tasks may wait, and how many bytes (0: half of the memory), of which batch has half. Returns why there is none.
local function grant_room(tier, count, size, limits, field)
  local most, most_bytes = string.match(limits, '^(%d+) (%d+)$')
  most, most_bytes = tonumber(most), tonumber(most_bytes)
  if most_bytes == 0 then
    local memory = tonumber(string.match(redis.call('INFO', 'memory'), 'maxmemory:(%d+)'))
    most_bytes = memory > 0 and memory / 2 or math.huge
  end
  local tasks, batch, all = count_waiting()
  local left = most_bytes - all
  if tier == 'batch' then left = math.min(left, most_bytes / 2 - batch) end
  if count > most - tasks then return 'tasks ' .. most end
  if size > left then
    return string.format('%s %.0f', tier == 'batch' and 'bytes-of-batch' or 'bytes', most_bytes)
  end
  local granted = math.min(most - tasks - count, (left - size) / GRANT_BYTES, 1e9) / 2
  redis.call('HSET', ROOM, field, string.format('%.0f', math.floor(granted)))
end
