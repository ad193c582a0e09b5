#!lua flags=allow-oom
-- Say that a worker lives, also when Redis is full, and count what waits for it.
-- KEYS: heartbeat, then the lists it serves
-- ARGV: heartbeat (JSON), its ttl in seconds
-- Returns how many tasks wait.
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
local waiting = 0
for index = 2, #KEYS do waiting = waiting + redis.call('LLEN', KEYS[index]) end
return waiting
