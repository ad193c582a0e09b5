#!lua flags=allow-oom
-- needs: clock places lists later
-- Move claimed tasks from flight to the tasks that wait for their ETA. This does not count as a delivery.
-- KEYS: in-flight hash
-- ARGV: maximum tasks that may wait for an ETA in all, then (seq, due in seconds since the epoch)
-- Returns {1-based positions of tasks that are due already}, {positions of tasks that cannot wait}, why they cannot
-- ('': too many tasks wait). All of these stay in flight.
local room, at = tonumber(ARGV[1]) - count_later(), now()
local due, refused, why, sets = {}, {}, '', {}
for i = 2, #ARGV, 2 do
  local seq, place = ARGV[i], i / 2
  local payload, list = unpack(redis.call('HMGET', KEYS[1], seq, seq .. ':list'))
  if tonumber(ARGV[i + 1]) <= at then
    due[#due + 1] = place
  elseif not (payload and list) then
    -- It is no longer in flight: it was put back.
  elseif room <= 0 then
    refused[#refused + 1] = place
  else
    local set = sets[list] or {entries = {}, seqs = {}, places = {}}
    sets[list] = set
    local entries, seqs = set.entries, set.seqs
    entries[#entries + 1], entries[#entries + 2] = ARGV[i + 1], payload
    seqs[#seqs + 1], seqs[#seqs + 2] = seq, seq .. ':list'
    set.places[#set.places + 1] = place
    room = room - 1
  end
end
for list, set in pairs(sets) do
  local err = put_later(list, set.entries)
  if err then
    why = err.err
    for _, place in ipairs(set.places) do refused[#refused + 1] = place end
  else
    for first = 1, #set.seqs, 1000 do
      redis.call('HDEL', KEYS[1], unpack(set.seqs, first, math.min(first + 999, #set.seqs)))
    end
    local _, index = place_of(list)
    redis.call('HINCRBY', CLAIMED, counter_of(list, index), -#set.places)
  end
end
return {due, refused, why}
