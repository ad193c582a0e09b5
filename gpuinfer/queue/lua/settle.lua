#!lua flags=allow-oom
-- needs: states
-- Write the final states of tasks, tell them, and drop the tasks from flight, in one step.
-- KEYS: in-flight hash
-- ARGV: result ttl in seconds, '1' when nothing runs now, then for each task: seq, task id, meta, '1' to keep
--       the state, reply channel, label; an empty seq is not in flight; an empty id leaves all states as they are
-- Returns how many final states were written, then (id, why) of those whose key is not ours to write.
-- Of an end that is not kept nothing tells, when it comes again, that it was told, but that the task is not in
-- flight any more.
for i = 3, #ARGV, 6 do
  if ARGV[i + 3] ~= '1' and ARGV[i] ~= '' and redis.call('HEXISTS', KEYS[1], ARGV[i]) == 0 then ARGV[i + 1] = '' end
end
-- Changes nothing, and fails as the call below would: a task must not end and stay in flight.
redis.call('HDEL', KEYS[1], '')
local written, refused = finish(ARGV, 4, 6, ARGV[1])
if not written then return refused end
local gone, n = {}, 0
for i = 3, #ARGV, 6 do
  local seq = ARGV[i]
  if seq ~= '' then
    gone[n + 1], gone[n + 2] = seq, seq .. ':list'
    n = n + 2
  end
end
for first = 1, #gone, 1000 do
  redis.call('HDEL', KEYS[1], unpack(gone, first, math.min(first + 999, #gone)))
end
-- A crash after this point is not charged to the last batch.
if ARGV[2] == '1' then redis.call('HDEL', KEYS[1], 'running') end
table.insert(refused, 1, written)
return refused
