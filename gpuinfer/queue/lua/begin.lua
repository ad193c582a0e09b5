#!lua flags=allow-oom
-- Note which tasks a worker runs, and mark them as started.
-- KEYS: in-flight hash
-- ARGV: result key prefix, the record of what runs (seqs, space separated),
--       then (task id, started meta) pairs; an empty meta marks nothing
-- Returns the 1-based positions of tasks whose final state is already written: they must not run.
local prefix = ARGV[1]
-- What a producer of ours has written: compared whole, which is cheaper than to look for a word in it.
local pending = '{"status": "PENDING", "result": '
redis.call('HSET', KEYS[1], 'running', ARGV[2])
local done = {}
for i = 3, #ARGV, 2 do
  local key = prefix .. ARGV[i]
  local meta = redis.call('GETRANGE', key, 0, 31)
  local state = meta ~= pending and string.match(meta, '^{"status": ?"(%u+)"')
  if state == 'SUCCESS' or state == 'FAILURE' or state == 'REVOKED' then
    done[#done + 1] = (i - 1) / 2
  elseif ARGV[i + 1] ~= '' then
    redis.call('SET', key, ARGV[i + 1])
  end
end
return done
