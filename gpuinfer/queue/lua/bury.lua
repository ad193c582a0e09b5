#!lua flags=allow-oom
-- needs: states
-- Move a task from flight to the dead letters, with its failure result, in one step.
-- KEYS: in-flight hash, dead-letter hash
-- ARGV: seq, task id, dead letter (JSON), result ttl in seconds, meta ('' for none), reply channel, label
local seq, id = ARGV[1], ARGV[2]
-- Changes nothing, and fails as the calls below would: a task must not end and stay in flight.
redis.call('HDEL', KEYS[1], '')
redis.call('HEXISTS', KEYS[2], id)
local denied = may({'HSET', KEYS[2], id, ''})
if denied then return denied end
if ARGV[5] ~= '' then
  local written, err = finish({id, ARGV[5], '1', ARGV[6], ARGV[7]}, 1, 5, ARGV[4])
  if not written then return err end
end
redis.call('HSET', KEYS[2], id, ARGV[3])
redis.call('HDEL', KEYS[1], seq, seq .. ':list')
return 1
