#!lua flags=no-writes,allow-oom
-- needs: lists
-- Count what waits in each list: those of the index, and those that a plain producer may have filled.
-- Returns {default model or '', {model, last seen, ...} of the catalogue, {list, tasks, ...} where some wait,
-- {list, tasks ever claimed, ...}}.
local known = redis.call('ZRANGE', CATALOGUE, 0, -1, 'WITHSCORES')
local seen, found = {}, {}
local function count(list)
  if seen[list] then return end
  seen[list] = true
  local size = redis.call('LLEN', list)
  if size > 0 then found[#found + 1], found[#found + 2] = list, size end
end
local function count_all(model)
  for _, list in ipairs(redis.call('ZRANGE', INDEX_PREFIX .. model, 0, -1)) do count(list) end
  for tier in pairs(BASE) do
    for priority = 0, 9 do count(list_of(priority == 0 and tier or tier .. SEP .. priority, model)) end
  end
end
local models = {[''] = true}
for i = 1, #known, 2 do models[known[i]] = true end
for _, model in ipairs(redis.call('SMEMBERS', INDEXED)) do models[model] = true end
for model in pairs(models) do count_all(model) end
return {redis.call('GET', DEFAULT_MODEL) or '', known, found, redis.call('HGETALL', CLAIMED)}
