#!lua flags=allow-oom
-- Write the final states of tasks, publish them, and drop the tasks from flight, in one step.
-- A final state is written once: a later one for the same id is ignored.
-- KEYS: in-flight hash
-- ARGV: result ttl in seconds, result key prefix, '1' when nothing runs now, which of the tasks (counted from
--       0, a space before and after each) keep no state: their end is published, what stands there is dropped
--       unless it is final; then (seq, task id, meta) triples; an empty seq is not in flight; an empty id
--       leaves all as it is
-- Returns how many final states were written.
local ttl, prefix = ARGV[1], ARGV[2]
local written, gone = 0, {}
-- What a producer of ours has written: compared whole, which is cheaper than to look for a word in it.
local pending = '{"status": "PENDING", "result": '
for i = 5, #ARGV, 3 do
  local seq, id, meta = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if seq ~= '' then gone[#gone + 1], gone[#gone + 2] = seq, seq .. ':list' end
  if id ~= '' then
    local key = prefix .. id
    local before = redis.call('GETRANGE', key, 0, 31)
    local state = before ~= pending and string.match(before, '^{"status": ?"(%u+)"')
    if state ~= 'SUCCESS' and state ~= 'FAILURE' and state ~= 'REVOKED' then
      if ARGV[4] ~= '' and string.find(ARGV[4], ' ' .. (i - 5) / 3 .. ' ', 1, true) then
        redis.call('DEL', key)
      else
        redis.call('SET', key, meta, 'EX', ttl)
        written = written + 1
      end
      redis.call('PUBLISH', key, meta)
    end
  end
end
for first = 1, #gone, 1000 do
  redis.call('HDEL', KEYS[1], unpack(gone, first, math.min(first + 999, #gone)))
end
-- A death from now on is not on the account of what ran last.
if ARGV[3] == '1' then redis.call('HDEL', KEYS[1], 'running') end
return written
