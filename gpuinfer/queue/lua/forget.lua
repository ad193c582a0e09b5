#!lua flags=allow-oom
-- Remove the epochs of workers that hold no tasks and were not seen for long, or left long ago: their names may never
-- come back. The other data of a worker that did not leave is removed by the next heartbeat of any worker
-- (register.lua).
-- Returns how many were removed; checks up to a thousand names.
local since, count = redis.call('TIME')[1] - WORKER_VOID, 0
local function forget(worker)
  if redis.call('HLEN', INFLIGHT_PREFIX .. worker) > 0 then return end
  if redis.call('HDEL', EPOCH_PREFIX .. worker, 'number', 'by') > 0 then count = count + 1 end
end
for _, worker in ipairs(redis.call('ZRANGE', WORKERS, '-inf', since, 'BYSCORE', 'LIMIT', 0, 500)) do forget(worker) end
for _, worker in ipairs(redis.call('ZRANGE', LEFT, '-inf', since, 'BYSCORE', 'LIMIT', 0, 500)) do
  if not redis.call('ZSCORE', WORKERS, worker) then forget(worker) end
  redis.call('ZREM', LEFT, worker)
end
return count
