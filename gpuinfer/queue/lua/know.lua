#!lua flags=allow-oom
-- Say which models somebody could serve, also when Redis is full: a full one needs workers.
-- ARGV: models
local time = redis.call('TIME')
for _, model in ipairs(ARGV) do redis.call('ZADD', CATALOGUE, time[1], model) end
