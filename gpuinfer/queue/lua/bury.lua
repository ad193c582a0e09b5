#!lua flags=allow-oom
-- Move a task from flight to the dead letters, with its failure result, in one step.
-- KEYS: in-flight hash, dead-letter hash
-- ARGV: seq, task id, dead letter (JSON), result ttl in seconds, result key, meta ('' for none)
local seq, id = ARGV[1], ARGV[2]
redis.call('HSET', KEYS[2], id, ARGV[3])
redis.call('HDEL', KEYS[1], seq, seq .. ':list')
if ARGV[6] ~= '' then
  local state = string.match(redis.call('GETRANGE', ARGV[5], 0, 31), '^{"status": ?"(%u+)"')
  if state ~= 'SUCCESS' and state ~= 'FAILURE' and state ~= 'REVOKED' then
    redis.call('SET', ARGV[5], ARGV[6], 'EX', ARGV[4])
    redis.call('PUBLISH', ARGV[5], ARGV[6])
  end
end
return 1
