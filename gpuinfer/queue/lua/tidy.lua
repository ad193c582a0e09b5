#!lua flags=allow-oom
-- needs: clock
-- Forget what is kept of callers that have nothing waiting, and would be the same if it were made anew. One step of one
-- hash.
-- ARGV: claimed, turns, room or rates; cursor
-- Returns the next cursor; '0' at the end.
local HASHES = {claimed = CLAIMED, turns = TURNS, room = ROOM, rates = RATES}
local kept = HASHES[ARGV[1]]
local next, flat = unpack(redis.call('HSCAN', kept, ARGV[2], 'COUNT', 500))
for i = 1, #flat, 2 do
  local field, value = flat[i], flat[i + 1]
  local list = string.match(field, '^[^ ]*')
  local caller = string.match(list, '@([^@\6\22]+)')
  if ARGV[1] == 'rates' then
    -- Who may submit its whole burst has no need to be known.
    if tonumber(value) and tonumber(value) < now() then redis.call('HDEL', kept, field) end
  elseif ARGV[1] == 'room' then
    -- A grant that is gone is made again, by a count.
    if caller then redis.call('HDEL', kept, field) end
  elseif caller and caller ~= '*' and redis.call('EXISTS', list) == 0 and not redis.call('ZSCORE', LATER, list) then
    -- What was claimed from it stays in the sum of its tier and model, under a caller that nobody is.
    if ARGV[1] == 'claimed' then
      local queue, default = string.match(field, '^([^@]*)@[^ ]*(.*)$')
      redis.call('HINCRBY', CLAIMED, queue .. '@*' .. default, value)
    end
    redis.call('HDEL', kept, field)
  end
end
return next
