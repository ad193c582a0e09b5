#!lua flags=allow-oom
-- needs: clock places lists states ends
-- Pass on tasks that wait in one list but are for other models, and end those for unknown models. No task is claimed,
-- and all tasks keep their order. Up to FEW tasks are searched for from the end of the list: 0.1 us for each task
-- before one. For more, all tasks up to the last of them are popped, and those that stay are pushed back: 1.5 us for
-- each task of 400 bytes.
-- KEYS: list
-- ARGV: result ttl in seconds, number of tasks served before those that were read; then for each task, in the order of
--       serving: how many of those that were read are served before it, payload, its model, task id ('': it is passed
--       on), meta, '1' to store the state, reply channel, label
-- Returns how many were passed on or ended: those that are still at their place.
local read, step, FEW = tonumber(ARGV[2]), 8, 3
local found = redis.call('LRANGE', KEYS[1], -read - tonumber(ARGV[#ARGV - step + 1]) - 1, -read - 1)
local moved = {}
for i = 3, #ARGV, step do
  if found[#found - tonumber(ARGV[i])] == ARGV[i + 1] then
    moved[#moved + 1] = i
  else
    ARGV[i + 3] = ''
  end
end
if #moved == 0 then return 0 end
local ends = {}
for _, i in ipairs(moved) do ends[i] = ARGV[i + 3] ~= '' end
local written, refused = finish(ARGV, 6, step, ARGV[1])
if not written then return refused end
local lists, wakes = {}, {}
local gone, count, deepest = {}, 0, 0
for _, i in ipairs(moved) do
  local why
  if not ends[i] then
    local model, tier, indexed = ARGV[i + 2], nil, nil
    lists[model] = lists[model] or list_of(KEYS[1], model)
    tier, indexed, why = pass_on(lists[model], ARGV[i + 1])
    if not why then
      wakes[model] = wakes[model] or {tier, indexed, 0}
      wakes[model][3] = wakes[model][3] + 1
    end
  end
  -- A task that cannot be passed on stays where it is.
  if not why then
    deepest, count = read + ARGV[i] + 1, count + 1
    gone[deepest] = ARGV[i + 1]
    if ends[i] and revoked then
      -- needs: keyed
      if revoked[ARGV[i + 3]] then free_key(ARGV[i + 1], ARGV[i + 3]) end
    end
  end
end
if count <= FEW then
  for _, payload in pairs(gone) do redis.call('LREM', KEYS[1], -1, payload) end
else
  local first, stays, n = {}, {}, 0
  while #first < deepest do
    for _, payload in ipairs(redis.call('RPOP', KEYS[1], math.min(1000, deepest - #first))) do
      first[#first + 1] = payload
    end
  end
  for place = deepest, 1, -1 do
    if not gone[place] then
      n = n + 1
      stays[n] = first[place]
    end
  end
  for i = 1, n, 1000 do redis.call('RPUSH', KEYS[1], unpack(stays, i, math.min(i + 999, n))) end
end
for _, one in pairs(wakes) do wake_for(unpack(one)) end
return count
