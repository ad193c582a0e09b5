#!lua
-- needs: lists states
-- Append tasks to their list, remember their ids, and wake idle workers. Without allow-oom: a full Redis
-- refuses the whole call before anything is written.
-- KEYS: large bodies of some of these tasks, which lie there for a minute; from now on, until they have ended
-- ARGV: tier, model ('' for the default one), caller ('' for none), priority, pending meta, idempotency key or
--       '', its ttl in seconds, then (id, payload) pairs
-- Returns the id that holds: the given one, or the one an idempotency key already stands for.
-- What is refused leaves nothing behind.
local function drop_these()
  for _, body in ipairs(KEYS) do redis.call('UNLINK', body) end
end
local function refuse(why)
  drop_these()
  return redis.error_reply(why)
end
local format
format, default = unpack(redis.call('MGET', FORMAT_KEY, DEFAULT_MODEL))
default = default or ''
if format and format ~= FORMAT then return refuse('FORMAT ' .. format) end
local tier, model, caller, priority = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if model ~= '' and not redis.call('ZSCORE', CATALOGUE, model) then
  local known = redis.call('ZRANGE', CATALOGUE, 0, -1)
  local what = model == default and 'UNKNOWN_DEFAULT ' or 'UNKNOWN_MODEL '
  if #known > 0 then return refuse(what .. model .. ' ' .. table.concat(known, ', ')) end
end
for _, body in ipairs(KEYS) do
  if redis.call('EXISTS', body) == 0 then return refuse('BODY_GONE') end
end
if ARGV[6] ~= '' then
  local holder = redis.call('GET', ARGV[6])
  -- A holder whose result has expired holds no more.
  if holder and holder ~= ARGV[8] and state_of(holder) then
    drop_these()
    return holder
  end
  redis.call('SET', ARGV[6], ARGV[8], 'EX', ARGV[7])
end
local queue = tier
if model ~= '' and model ~= default then queue = queue .. '.' .. model end
if caller ~= '' then queue = queue .. '@' .. caller end
local list = priority == '0' and queue or queue .. SEP .. priority
local payloads = {}
for i = 8, #ARGV, 2 do
  -- NX: a call repeated because its answer was lost appends nothing twice.
  -- Without a TTL: what waits is never evicted, and so never forgotten.
  if write_passing(ARGV[i], ARGV[5], 'NX') then payloads[#payloads + 1] = ARGV[i + 1] end
end
for _, body in ipairs(KEYS) do
  local id = string.sub(body, #BODY_PREFIX + 1)
  if not FINAL[state_of(id) or ''] then
    redis.call('PERSIST', body)
    count_body(tier, id)
  end
end
for first = 1, #payloads, 1000 do
  redis.call('LPUSH', list, unpack(payloads, first, math.min(first + 999, #payloads)))
end
if #payloads > 0 then index_list(list) end
wake(tier, model == '' and default or model, math.max(1, #payloads))
return ARGV[8]
