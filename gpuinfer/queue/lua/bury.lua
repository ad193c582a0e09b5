#!lua flags=allow-oom
-- needs: clock places lists states ends again chain dead
-- Move a task from flight to the dead letters, with its failure result, in one step.
-- KEYS: in-flight hash
-- ARGV: seq, task id, dead letter (JSON), result ttl in seconds, meta ('' for none), reply channel, label,
--       then what follows (chain.lua)
-- Returns {id, why, ...} of the successors that were refused.
local seq, id = ARGV[1], ARGV[2]
-- These calls change nothing, but fail if the calls below would: a task must not end and stay in flight.
redis.call('HDEL', KEYS[1], '')
redis.call('HEXISTS', DEAD, id)
redis.call('ZSCORE', DEAD_AGES, id)
redis.call('GET', DEAD_BYTES)
local denied = may('HSET', DEAD, id, '') or may('HDEL', DEAD, id) or may('ZADD', DEAD_AGES, '1', id)
  or may('ZREM', DEAD_AGES, id) or may('SET', DEAD_BYTES, '1')
if denied then return denied end
local following = read_following(ARGV, 8)
for _, one in ipairs(following) do
  if redis.call('HEXISTS', KEYS[1], seq) == 1 then one.success = outcome_of(one.id, ARGV[5]) end
end
if ARGV[5] ~= '' then
  local written, err = finish({id, ARGV[5], '1', ARGV[6], ARGV[7]}, 1, 5, ARGV[4], nil, true)
  if not written then return err end
end
if revoked then
  -- needs: keyed
  free_key(redis.call('HGET', KEYS[1], seq) or '', id)
end
local unsent = follow(following, ARGV[4])
add_letter(DEAD_LETTERS, id, ARGV[3])
redis.call('HDEL', KEYS[1], seq, seq .. ':list')
return unsent
