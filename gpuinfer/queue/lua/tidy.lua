#!lua flags=allow-oom
-- needs: clock
-- Remove data of callers that have nothing waiting, if it can be recomputed. Does one step through one hash.
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
    -- A caller that may submit its full burst needs no entry.
    if tonumber(value) and tonumber(value) < now() then redis.call('HDEL', kept, field) end
  elseif ARGV[1] == 'room' then
    -- A grant that is removed is renewed by the next count.
    if caller then redis.call('HDEL', kept, field) end
  elseif caller and caller ~= '*' and redis.call('EXISTS', list) == 0 and not redis.call('ZSCORE', LATER, list) then
    -- Keep the count in the sum of its tier and model, under the caller "*", which no caller can be named.
    if ARGV[1] == 'claimed' then
      local queue, default = string.match(field, '^([^@]*)@[^ ]*(.*)$')
      redis.call('HINCRBY', CLAIMED, queue .. '@*' .. default, value)
    end
    redis.call('HDEL', kept, field)
  end
end
return next
