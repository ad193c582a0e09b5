#!lua
-- needs: clock places states
-- Append tasks to their list, write their states, and wake idle workers. No allow-oom: a full Redis refuses the whole
-- call before anything is written.
-- KEYS: large bodies of some of these tasks; they have a TTL of a minute, which this removes until the tasks have ended
-- ARGV: 1 tier, 2 model ('' for the default one), 3 caller ('' for none), 4 priority, 5 maximum waiting tasks and bytes
--       (room.lua), 6 an idempotency key and a digest of the request (32 characters each) or '', 7 seconds that the key
--       is valid, 8 maximum keys in a period, 9 seconds until the tasks may begin or '', 10 maximum tasks that wait for
--       their ETA in all, 11 the caller's quota (quota.lua) or '', then for each task: id, payload, and the end of its
--       state, beginning with its number in this call
-- Returns the valid id: the given one, or that of the task that already has the idempotency key. A client's own id
-- comes with a key made from it: if the key or the id is known, nothing is written. With a rate limit, returns {that
-- id, tasks that would be accepted now, seconds until a full burst would be accepted}. A refused call leaves nothing
-- behind.
local charge, key_room
local function accept(id) return charge and charge(id) or id end
local function drop_these()
  for _, body in ipairs(KEYS) do
    -- A body without a TTL belongs to an earlier task with this id, and is kept.
    if redis.call('TTL', body) >= 0 then redis.call('UNLINK', body) end
  end
end
local function refuse(why)
  -- If the task has a state, this call repeats one whose answer was lost, and which was accepted as a whole.
  if state_of(ARGV[12]) then return ARGV[12] end
  drop_these()
  return redis.error_reply(why)
end
local format, usual = unpack(redis.call('MGET', FORMAT_KEY, DEFAULT_MODEL))
usual = usual or ''
if format and format ~= FORMAT then return refuse('FORMAT ' .. format) end
local tier, model, caller, priority = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if model ~= '' and not redis.call('ZSCORE', CATALOGUE, model) then
  local known = redis.call('ZRANGE', CATALOGUE, 0, -1)
  local what = model == usual and 'UNKNOWN_DEFAULT ' or 'UNKNOWN_MODEL '
  if #known > 0 then return refuse(what .. model .. ' ' .. table.concat(known, ', ')) end
end
for i = 1, #KEYS do
  local body = KEYS[i]
  if redis.call('EXISTS', body) == 0 then return refuse('BODY_GONE') end
end
local count = (#ARGV - 11) / 3
if ARGV[11] ~= '' then
  -- needs: quota
  local why
  why, charge = meter(caller, ARGV[11], count)
  if why then return refuse(why) end
  key_room = function(size) return grant_key_room(caller, ARGV[11], count, size) end
end
if ARGV[9] ~= '' then
  -- needs: later
  if count_later() + count > tonumber(ARGV[10]) then return refuse('LATER_FULL ' .. ARGV[10]) end
end
local hold_key
if ARGV[6] ~= '' then
  -- needs: keyed
  local key, request, ttl = string.sub(ARGV[6], 1, 32), string.sub(ARGV[6], 33), tonumber(ARGV[7])
  local holder, same = holder_of(key, request)
  local own = state_of(ARGV[12])
  -- A task that was cancelled or purged, or has expired, frees its key, except for a request with its own id.
  if holder and holder ~= ARGV[12] and state_of(holder) == 'REVOKED' then holder = nil end
  -- A body without a TTL is kept for an earlier task with this id, whose state is gone: it does not belong to this one.
  local other = false
  if not holder and not own then
    for _, body in ipairs(KEYS) do other = other or redis.call('TTL', body) == -1 end
  end
  local conflict = holder and not same or other
    or own and (not holder and own ~= 'REVOKED' or owner_of(ARGV[12]) ~= caller)
  if conflict or holder or own then
    if not own or FINAL[own] then drop_these() end
    return conflict and redis.error_reply('IDEMPOTENCY_CONFLICT') or accept(holder or ARGV[12])
  end
  local full = refused_at(ttl, tonumber(ARGV[8]))
  if full then return refuse(string.format('QUEUE_FULL keys %.0f', full)) end
  hold_key = function() hold(key, request, ARGV[12], ttl) end
end
local queue, index = tier, ''
if model ~= '' and model ~= usual then queue, index = queue .. '.' .. model, model end
if caller ~= '' then queue = queue .. '@' .. caller end
-- Frequent numbers are given as texts, because formatting one takes half a microsecond.
local rank = priority == '0' and LAST_RANK[tier] or BASE[tier] + 9 - priority
local list = priority == '0' and queue or queue .. SEP .. priority
local length = redis.pcall('LLEN', list)
if type(length) == 'table' then return refuse(length.err) end
local size = 0
for i = 13, #ARGV, 3 do size = size + #ARGV[i] end
for i = 1, #KEYS do
  local body = KEYS[i]
  size = size + redis.call('STRLEN', body)
end
if key_room then
  local full = key_room(size)
  if full then return refuse(full) end
end
local room = (tier == 'batch' and 'batch ' or 'others ') .. ARGV[5]
local taken = count == 1 and size < GRANT_BYTES and '-1' or -(count + math.floor(size / GRANT_BYTES))
if redis.call('HINCRBY', ROOM, room, taken) < 0 then
  -- needs: room
  local full = grant_room(tier, count, size, ARGV[5], room)
  if full then return refuse('QUEUE_FULL ' .. full) end
end
if hold_key then hold_key() end
-- The `place` in a state is: 1 for the default model's lists or 0 for another model's, tasks claimed from the list
-- until now (-1: not read), tasks waiting there, and, given by the client, the task's number in this call. If the list
-- is empty, a single task needs only the last.
local is_default = index == ''
local claimed, ahead = '-1', length == 0 and '0' or string.format('%d', length) -- in half the time of ..
if length > 0 or count > 1 then
  local counter = is_default and usual ~= '' and list .. ' ' .. usual or list
  claimed = redis.call('HGET', CLAIMED, counter) or '0'
end
local owner = caller == '' and '' or '"caller":"' .. caller .. '",'
local meta = PENDING_HEAD .. 'null,"about":{' .. owner .. '"queue":"' .. tier .. '","model":"' .. (is_default and usual or model)
  .. (is_default and '","place":[1,' or '","place":[0,') .. claimed .. ',' .. ahead .. ','
local payloads = {}
for i = 12, #ARGV, 3 do
  -- NX: a call that is repeated because its answer was lost appends nothing twice.
  -- No TTL: the state of a waiting task must never be evicted.
  if write_passing(ARGV[i], meta .. ARGV[i + 2], 'NX') then payloads[#payloads + 1] = ARGV[i + 1] end
end
local accepted = #payloads
if accepted > 0 then
  local named = model ~= '' and model or usual ~= '' and usual or '-'
  redis.pcall('HINCRBY', COUNTS, 'submitted ' .. tier .. ' ' .. named, accepted == 1 and '1' or accepted)
end
for i = 1, #KEYS do
  local body = KEYS[i]
  local id = string.sub(body, #BODY_PREFIX + 1)
  if not FINAL[state_of(id) or ''] then
    redis.call('PERSIST', body)
    count_body(tier, caller, id)
  end
end
if ARGV[9] ~= '' then
  -- Keep the given order. No worker is woken: idle workers check when the first task is due.
  -- needs: later
  local entries, at = {}, now() + tonumber(ARGV[9])
  for i, payload in ipairs(payloads) do
    entries[2 * i - 1], entries[2 * i] = string.format('%.6f', at + i / 1000000), payload
  end
  local err = #payloads > 0 and put_later(list, entries)
  return err or accept(ARGV[12])
end
for first = 1, #payloads, 1000 do
  redis.call('LPUSH', list, unpack(payloads, first, math.min(first + 999, #payloads)))
end
local new = #payloads > 0 and redis.pcall('ZADD', INDEX_PREFIX .. index, rank, list) == 1
if new or redis.call('EXISTS', IDLE) == 1 then
  -- needs: lists
  default = usual
  if new then enter_orders(tier, index, rank) end
  wake(tier, model == '' and usual or model, math.max(1, #payloads))
end
return accept(ARGV[12])
