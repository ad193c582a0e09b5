#!lua flags=allow-oom
-- needs: lists states chain
-- Move a task from flight to the dead letters, with its failure result, in one step.
-- KEYS: in-flight hash, dead-letter hash
-- ARGV: seq, task id, dead letter (JSON), result ttl in seconds, meta ('' for none), reply channel, label,
--       then what follows (chain.lua)
-- Returns {id, why, ...} of what follows and was refused.
local seq, id = ARGV[1], ARGV[2]
-- Changes nothing, and fails as the calls below would: a task must not end and stay in flight.
redis.call('HDEL', KEYS[1], '')
redis.call('HEXISTS', KEYS[2], id)
local denied = may({'HSET', KEYS[2], id, ''})
if denied then return denied end
local following = read_following(ARGV, 8)
for _, one in ipairs(following) do
  if redis.call('HEXISTS', KEYS[1], seq) == 1 then one.success = outcome_of(one.id, ARGV[5]) end
end
if ARGV[5] ~= '' then
  local written, err = finish({id, ARGV[5], '1', ARGV[6], ARGV[7]}, 1, 5, ARGV[4], nil, true)
  if not written then return err end
end
local unsent = follow(following, ARGV[4])
redis.call('HSET', KEYS[2], id, ARGV[3])
redis.call('HDEL', KEYS[1], seq, seq .. ':list')
return unsent
