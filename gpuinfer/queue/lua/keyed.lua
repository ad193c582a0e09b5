-- Library: idempotency keys, each with its task and a digest of what was asked. They stand in the hash of the
-- current period and in that of the period before, which goes when the next one begins. Neither has a TTL: under
-- volatile policies no key is evicted. A period is at least as long as its keys hold.
-- A value is: digest of the request (32 characters), until when it holds (10 digits), task id. The empty field of
-- the current hash has: when the period began, its length, and how many keys a sixteenth of the memory holds.

-- Return the task that a key stands for, and whether the request is the same; nothing where it stands for none.
local function holder_of(key, request)
  for _, value in ipairs({redis.call('HGET', KEYED, key) or '', redis.call('HGET', KEYED_BEFORE, key) or ''}) do
    if (tonumber(string.sub(value, 33, 42)) or 0) > now() then
      return string.sub(value, 43), string.sub(value, 1, 32) == request
    end
  end
end

-- Let the key of a task's message stand for nothing: it did not run. Our clients write the
-- headers behind the body, in less than a kilobyte.
local function free_key(payload, id)
  local key = string.match(string.sub(payload, -2048), '"gpuinfer_key": ?"(%x+)"')
  if not key then return end
  for _, keyed in ipairs({KEYED, KEYED_BEFORE}) do
    -- What is no hash, or not ours to read, keeps no task from its end.
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

-- Return how many keys there may be in a period where there is no room for one more: its period may have to begin.
-- `most`: as this caller has it set. More memory, and more by another setting, count at once.
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

-- Let a key stand for a task.
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
