#!lua flags=allow-oom
-- Drain a worker, or resume it. A drained worker claims nothing. The worker is woken, so that it notices at once; a
-- drained one then leaves the idle workers, so that it is not woken in vain.
-- ARGV: worker, '1' to drain it
-- Returns 1, or 0 if it already was in that state.
local worker, drain = ARGV[1], ARGV[2] == '1'
local kept, there = {}, false
for name in string.gmatch(redis.call('GET', DRAINED) or '', '%S+') do
  if name == worker then there = true else kept[#kept + 1] = name end
end
if drain == there then return 0 end
if drain then kept[#kept + 1] = worker end
table.sort(kept)
if #kept > 0 then
  redis.call('SET', DRAINED, table.concat(kept, ' '))
else
  redis.call('DEL', DRAINED)
end
if redis.call('ZSCORE', WORKERS, worker) and redis.call('LPUSH', WAKE_PREFIX .. worker, 1) > 1 then
  redis.call('LTRIM', WAKE_PREFIX .. worker, 0, 0)
end
return 1
