-- Library: idempotency keys, each with its task and a digest of the request. They are stored in two hashes: that of the
-- current period, and that of the period before, which is deleted when the next period begins. The hashes have no TTL,
-- so that volatile eviction policies never evict them. A period is at least as long as its keys are valid. A value is:
-- digest of the request (32 characters), time until which the key is valid (10 digits), task id. The empty field of the
-- current hash has: when the period began, its length, and how many keys fit into a sixteenth of the memory.

-- Return the task of a key, and whether the request is the same; nothing if the key is unknown or no longer valid.
local function holder_of(key, request)
  for _, value in ipairs({redis.call('HGET', KEYED, key) or '', redis.call('HGET', KEYED_BEFORE, key) or ''}) do
    if (tonumber(string.sub(value, 33, 42)) or 0) > now() then
      return string.sub(value, 43), string.sub(value, 1, 32) == request
    end
  end
end

-- Remove the idempotency key of a task that did not run; it is read from the task's message. Our clients write the
-- headers after the body, in less than a kilobyte.
local function free_key(payload, id)
  local key = string.match(string.sub(payload, -2048), '"gpuinfer_key": ?"(%x+)"')
  if not key then return end
  for _, keyed in ipairs({KEYED, KEYED_BEFORE}) do
    -- pcall: a key of another type, or without the right to read it, must not keep the task from ending.
    local value = redis.pcall('HGET', keyed, key)
    if type(value) == 'string' and string.sub(value, 43) == id then redis.call('HDEL', keyed, key) end
  end
end

local function period()
  local begun, length, most = string.match(redis.call('HGET', KEYED, '') or '', '^(%d+) (%d+) (%d+)$')
  return tonumber(begun or 0), tonumber(length or 0), tonumber(most or 0)
end

local function note_period(...) redis.call('HSET', KEYED, '', string.format('%d %d %.0f', ...)) end

local function memory_holds()
  local memory = tonumber(string.match(redis.call('INFO', 'memory'), 'maxmemory:(%d+)'))
  return memory > 0 and math.floor(memory / 16 / KEYED_BYTES) or 1e15
end

-- If there is no room for another key, return the limit of keys per period. There is room if a new period is due.
-- `most`: the limit in the settings of this call. A raised setting, or more memory, has effect at once.
local function refused_at(ttl, most)
  local begun, length, holds = period()
  if begun + math.max(length, ttl) <= now() then return end
  local count = redis.call('HLEN', KEYED)
  if count > most then return most end
  if count > holds then
    holds = memory_holds()
    if count > holds then return holds end
    note_period(begun, length, holds)
  end
end

-- Store a key for a task.
local function hold(key, request, id, ttl)
  local begun, length, holds = period()
  if begun + math.max(length, ttl) <= now() then
    redis.call('UNLINK', KEYED_BEFORE)
    if begun > 0 then redis.call('RENAME', KEYED, KEYED_BEFORE) end
    begun, length, holds = math.floor(now()), 0, memory_holds()
  end
  if ttl > length then note_period(begun, ttl, holds) end
  redis.call('HSET', KEYED, key, request .. string.format('%010d', math.ceil(now() + ttl)) .. id)
end
