#!lua flags=allow-oom
-- needs: clock places lists states ends
-- Pass tasks on that wait in one list, but are for another model, and end those that are for none. Nothing was
-- claimed; they keep their order. Each is marked by its place, which costs no search, and one pass drops all
-- that are marked: 2 ms behind 20,000 tasks, where a search for each takes 3 ms a task.
-- KEYS: list
-- ARGV: result ttl in seconds, how many tasks, from the next to be served, stand before those that were read; then
--       for each task, the one to be served first in front: how many of those that were read stand before it,
--       payload, the model that it is for, task id ('' : it is passed on), meta, '1' to keep the state, reply
--       channel, label
-- Returns how many were passed on or ended: those that still have their place.
local read, mark, step = tonumber(ARGV[2]), 'passed on at ' .. now(), 8
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
local gone = 0
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
  -- What cannot be passed on stays where it is.
  if not why then
    redis.call('LSET', KEYS[1], -read - ARGV[i] - 1, mark)
    gone = gone + 1
    if ends[i] and revoked then
      -- needs: keyed
      if revoked[ARGV[i + 3]] then free_key(ARGV[i + 1], ARGV[i + 3]) end
    end
  end
end
if gone > 0 then redis.call('LREM', KEYS[1], -gone, mark) end
for _, one in pairs(wakes) do wake_for(unpack(one)) end
return gone
