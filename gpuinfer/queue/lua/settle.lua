#!lua flags=allow-oom
-- needs: states
-- Write the final states of tasks, tell them, and drop the tasks from flight, in one step.
-- KEYS: in-flight hash
-- ARGV: result ttl in seconds, '1' when nothing runs now, then for each task: seq, task id, meta, '1' to keep
--       the state, reply channel, label; an empty seq is not in flight; an empty id leaves all states as they are
-- Returns how many final states were written, then (id, why) of those whose key is not ours to write.
local ends, gone = {}, {}
for i = 3, #ARGV, 6 do
  local seq, id = ARGV[i], ARGV[i + 1]
  if seq ~= '' then gone[#gone + 1], gone[#gone + 2] = seq, seq .. ':list' end
  if id ~= '' then
    ends[#ends + 1] =
      {id = id, meta = ARGV[i + 2], keep = ARGV[i + 3] == '1', reply = ARGV[i + 4], label = ARGV[i + 5]}
  end
end
local written, refused = finish(ends, ARGV[1])
if not written then return refused end
for first = 1, #gone, 1000 do
  redis.call('HDEL', KEYS[1], unpack(gone, first, math.min(first + 999, #gone)))
end
-- A crash after this point is not charged to the last batch.
if ARGV[2] == '1' then redis.call('HDEL', KEYS[1], 'running') end
table.insert(refused, 1, written)
return refused
