#!lua flags=no-writes,allow-oom
-- needs: clock places lists
-- Count the waiting tasks of each list: lists in the index, lists that plain producers may have filled, and tasks that
-- wait for their ETA.
-- ARGV: seconds within which an ETA counts as due
-- Returns {default model or '', {model, last seen, ...} of the catalogue, {list, tasks, ...} of lists that are not
-- empty, {list, tasks ever claimed, ...}, {list, tasks that wait for their ETA, how many of them are due, ...}, the
-- paused queues or '', {key, type, ...} of keys with one of our names but another type}.
local known = redis.call('ZRANGE', CATALOGUE, 0, -1, 'WITHSCORES')
local seen, found, later, foreign = {}, {}, {}, {}
-- Return an answer; nothing if the key has another type, which is noted in `foreign`.
local function ours(name, answer)
  if type(answer) ~= 'table' or not answer.err then return answer end
  if not string.find(answer.err, 'WRONGTYPE', 1, true) then error(answer) end
  foreign[#foreign + 1], foreign[#foreign + 2] = name, redis.call('TYPE', name).ok
end
local function count(list)
  if seen[list] then return end
  seen[list] = true
  local size = ours(list, redis.pcall('LLEN', list)) or 0
  if size > 0 then found[#found + 1], found[#found + 2] = list, size end
end
local function count_all(model)
  local index = INDEX_PREFIX .. model
  for _, list in ipairs(ours(index, redis.pcall('ZRANGE', index, 0, -1)) or {}) do count(list) end
  for tier in pairs(BASE) do
    for priority = 0, 9 do count(list_of(priority == 0 and tier or tier .. SEP .. priority, model)) end
  end
end
local models = {[''] = true}
for i = 1, #known, 2 do models[known[i]] = true end
for _, model in ipairs(redis.call('SMEMBERS', INDEXED)) do models[model] = true end
for model in pairs(models) do count_all(model) end
for _, list in ipairs(redis.call('ZRANGE', LATER, 0, -1)) do
  local set = LATER_PREFIX .. list
  local size = ours(set, redis.pcall('ZCARD', set)) or 0
  if size > 0 then
    later[#later + 1], later[#later + 2] = list, size
    later[#later + 1] = redis.call('ZCOUNT', set, '-inf', now() + tonumber(ARGV[1]))
  end
end
local default, paused = unpack(redis.call('MGET', DEFAULT_MODEL, PAUSED))
return {default or '', known, found, redis.call('HGETALL', CLAIMED), later, paused or '', foreign}
