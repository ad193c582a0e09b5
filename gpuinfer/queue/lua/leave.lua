#!lua flags=allow-oom
-- Take a worker that ends out of the fleet. One that leaves tasks in flight stays known: they are put back.
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
