#!lua flags=allow-oom
-- Report models that a host can serve. Runs in a full Redis, too, because that needs workers.
-- ARGV: models
local time = redis.call('TIME')
for _, model in ipairs(ARGV) do redis.call('ZADD', CATALOGUE, time[1], model) end
