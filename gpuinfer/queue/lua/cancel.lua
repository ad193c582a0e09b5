#!lua flags=allow-oom
-- Write the final state of a task that no worker has begun; one that runs or has ended is left alone.
-- KEYS: result key
-- ARGV: meta, result ttl in seconds
-- Returns 1 when the state was written.
local state = string.match(redis.call('GETRANGE', KEYS[1], 0, 31), '^{"status": ?"(%u+)"')
if state ~= 'PENDING' then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
redis.call('PUBLISH', KEYS[1], ARGV[1])
return 1
