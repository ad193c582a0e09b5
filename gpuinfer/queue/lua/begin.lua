#!lua flags=allow-oom
-- Note which tasks a worker is about to run, and mark them as started.
-- KEYS: in-flight hash
-- ARGV: result key prefix, the record of what runs (seqs, space separated),
--       then (task id, started meta) pairs
-- Returns the 1-based positions of tasks whose final state is already written: they must not run.
local prefix = ARGV[1]
redis.call('HSET', KEYS[1], 'running', ARGV[2])
local done = {}
for i = 3, #ARGV, 2 do
  local key = prefix .. ARGV[i]
  local state = string.match(redis.call('GETRANGE', key, 0, 31), '^{"status": ?"(%u+)"')
  if state == 'SUCCESS' or state == 'FAILURE' or state == 'REVOKED' then
    done[#done + 1] = (i - 1) / 2
  else
    redis.call('SET', key, ARGV[i + 1])
  end
end
return done
