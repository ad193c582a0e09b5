#!lua flags=allow-oom
-- needs: lists
-- Pause a queue, or resume it: from a paused one nothing is claimed.
-- ARGV: a tier, or tier.model; '1' to pause it
-- Returns 1 when that has changed something.
local queue, pause = ARGV[1], ARGV[2] == '1'
local kept, there = {}, false
for name in string.gmatch(redis.call('GET', PAUSED) or '', '%S+') do
  if name == queue then there = true else kept[#kept + 1] = name end
end
if pause == there then return 0 end
if pause then kept[#kept + 1] = queue end
table.sort(kept)
if #kept > 0 then
  redis.call('SET', PAUSED, table.concat(kept, ' '))
else
  redis.call('DEL', PAUSED)
end
if pause then return 1 end
-- What has come meanwhile has woken nobody.
local tier, model = string.match(queue, '^(%a+)%.?(.*)$')
local models = {model}
if model == '' then
  models = redis.call('SMEMBERS', INDEXED)
  models[#models + 1] = redis.call('GET', DEFAULT_MODEL) or nil
end
for _, name in ipairs(models) do wake_for(tier, name, 1) end
return 1
