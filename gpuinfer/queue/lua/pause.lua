#!lua flags=allow-oom
-- needs: clock places lists
-- Pause a queue, or resume it. Nothing is claimed from a paused queue.
-- ARGV: a tier, or tier.model; '1' to pause it
-- Returns 1, or 0 if it already was in that state.
local queue, pause = ARGV[1], ARGV[2] == '1'
local kept, there = {}, false
for name in string.gmatch(redis.call('GET', PAUSED) or '', '%S+') do
  if name == queue then there = true else kept[#kept + 1] = name end
end
if pause == there then return 0 end
if pause then kept[#kept + 1] = queue end
table.sort(kept)
local function write()
  if #kept > 0 then
    redis.call('SET', PAUSED, table.concat(kept, ' '))
  else
    redis.call('DEL', PAUSED)
  end
  return 1
end
if pause then return write() end
-- Resuming: while the queue was paused, its lists have left the orders, and its new tasks have woken no worker.
local tier, model = string.match(queue, '^(%a+)%.?(.*)$')
local models = model == '' and redis.call('SMEMBERS', INDEXED) or model == default_model() and {model, ''} or {model}
for _, name in ipairs(models) do
  for _, list in ipairs(redis.pcall('ZRANGE', INDEX_PREFIX .. name, 0, -1)) do index_list(list, true) end
  wake_for(tier, name, 1)
end
return write()
