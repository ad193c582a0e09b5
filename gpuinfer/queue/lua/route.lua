#!lua flags=allow-oom
-- needs: lists
-- Pass tasks on that wait in one list, but are for another model. Nothing was claimed; they keep their order.
-- KEYS: list
-- ARGV: (payload, model) pairs, the one to be served first in front
-- Returns how many were passed on.
local passed, wakes = 0, {}
for i = 1, #ARGV, 2 do
  if redis.call('LREM', KEYS[1], -1, ARGV[i]) == 1 then
    local tier, model = pass_on(list_of(KEYS[1], ARGV[i + 1]), ARGV[i])
    wakes[model] = wakes[model] or {tier, model, 0}
    wakes[model][3] = wakes[model][3] + 1
    passed = passed + 1
  end
end
for _, one in pairs(wakes) do wake_for(unpack(one)) end
return passed
