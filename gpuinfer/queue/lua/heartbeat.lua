#!lua flags=allow-oom
-- Say that a worker lives, also when Redis is full, and count what waits for it.
-- KEYS: heartbeat, then the lists it serves
-- ARGV: heartbeat (a JSON object that is not empty); the time by Redis's clock is put in front, as "at"
-- Returns how many tasks wait.
local now = redis.call('TIME')
local at = string.format('{"at":%d.%06d,', now[1], now[2])
redis.call('SET', KEYS[1], at .. string.sub(ARGV[1], 2))
local waiting = 0
for index = 2, #KEYS do waiting = waiting + redis.call('LLEN', KEYS[index]) end
return waiting
