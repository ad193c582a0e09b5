#!lua flags=allow-oom
-- needs: states
-- Move a task from flight to the dead letters, with its failure result, in one step.
-- KEYS: in-flight hash, dead-letter hash
-- ARGV: seq, task id, dead letter (JSON), result ttl in seconds, meta ('' for none), reply channel, label
local seq, id = ARGV[1], ARGV[2]
redis.call('HSET', KEYS[2], id, ARGV[3])
if ARGV[5] ~= '' then
  local written, err =
    finish({{id = id, meta = ARGV[5], keep = true, reply = ARGV[6], label = ARGV[7]}}, ARGV[4])
  if not written then return err end
end
redis.call('HDEL', KEYS[1], seq, seq .. ':list')
return 1
