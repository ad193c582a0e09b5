#!lua
-- Send a dead letter to its list again as if newly submitted.
-- KEYS: dead-letter hash, list, bell, result key
-- ARGV: task id, payload, pending meta
-- Returns 1, 0 when the letter is gone, or -1 when the task has its result by now: that stands.
if string.match(redis.call('GETRANGE', KEYS[4], 0, 31), '^{"status": ?"SUCCESS"') then return -1 end
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('SET', KEYS[4], ARGV[3])
redis.call('LPUSH', KEYS[2], ARGV[2])
redis.call('LPUSH', KEYS[3], 1)
redis.call('LTRIM', KEYS[3], 0, 63)
return 1
