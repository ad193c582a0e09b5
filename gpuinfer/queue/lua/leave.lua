#!lua flags=allow-oom
-- Remove a worker that ends from the fleet. If it leaves tasks in flight, its name stays known until they are put back.
-- KEYS: heartbeat, in-flight hash
-- ARGV: worker, group
redis.call('ZREM', IDLE, ARGV[1])
redis.call('ZREM', IDLE_PREFIX .. ARGV[2], ARGV[1])
redis.call('DEL', KEYS[1], WAKE_PREFIX .. ARGV[1])
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('ZREM', WORKERS, ARGV[1])
  redis.call('ZADD', LEFT, redis.call('TIME')[1], ARGV[1])
end
return 1
