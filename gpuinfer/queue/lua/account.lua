#!lua flags=allow-oom
-- Add what a process has counted since its last flush, once: the same flush that comes again adds nothing.
-- Also when Redis is full: what is written here is bounded.
-- ARGV: 1 the process, 2 the number of its flush, 3 how many fields of usage, then each with its count, 4 how many
--       fields of counts, then each with its count, then the keys that were used
-- Returns whether anything was added.
local mark, number = FLUSHED_PREFIX .. ARGV[1], tonumber(ARGV[2])
if number <= tonumber(redis.call('GET', mark) or 0) then return 0 end
redis.call('SET', mark, ARGV[2], 'EX', FLUSHED_VOID)
local seconds = tonumber(redis.call('TIME')[1])

-- Add pairs of field and count, from `at` on; return where they end. A hash that has all the fields it may have takes no
-- new names: a field is a kind, and two names.
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
