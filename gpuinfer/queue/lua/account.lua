#!lua flags=allow-oom
-- Add the counts of a process since its last flush. A flush that is repeated adds nothing.
-- Runs in a full Redis, too: the amount of data written is bounded.
-- ARGV: 1 process, 2 number of the flush, 3 number of usage fields, then (field, count) pairs, then the number of
--       fields of counts, then (field, count) pairs, then the keys that were used
-- Returns 1, or 0 if this flush was added before.
local mark, number = FLUSHED_PREFIX .. ARGV[1], tonumber(ARGV[2])
if number <= tonumber(redis.call('GET', mark) or 0) then return 0 end
redis.call('SET', mark, ARGV[2], 'EX', FLUSHED_VOID)
local seconds = tonumber(redis.call('TIME')[1])

-- Add the (field, count) pairs whose number is at `at`; return the index after them. A field is a kind and two names. A
-- hash that has the maximum number of fields gets no new ones: new names are counted as "other".
local function add(hash, at)
  local last = at + 2 * ARGV[at]
  if last == at then return at + 1 end
  local full = redis.call('HLEN', hash) >= MOST_COUNTS
  for i = at + 1, last, 2 do
    local field = ARGV[i]
    if full and redis.call('HEXISTS', hash, field) == 0 then field = string.match(field, '^%S+') .. ' other other' end
    redis.call('HINCRBY', hash, field, ARGV[i + 1])
  end
  return last + 1
end

local usage = string.format('%s%d', USAGE_PREFIX, math.floor(seconds / 3600))
local at = add(usage, 3)
if at > 4 then redis.call('EXPIRE', usage, USAGE_KEPT) end
at = add(COUNTS, at)
for i = at, #ARGV do redis.call('HSET', KEY_USED, ARGV[i], seconds) end
return 1
