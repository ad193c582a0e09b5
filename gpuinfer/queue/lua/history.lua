#!lua flags=no-writes,allow-oom
-- Return entries of the history, the newest first.
-- ARGV: '1' for failed tasks only, a time in microseconds before which they ended ('': any), maximum number of entries
local past = ARGV[1] == '1' and FAILURES or HISTORY
local first, last = 0, redis.call('LLEN', past)
if ARGV[2] ~= '' then
  local before = tonumber(ARGV[2])
  while first < last do
    local middle = math.floor((first + last) / 2)
    local entry = redis.call('LINDEX', past, middle)
    if tonumber(string.match(entry, '^%d+') or 0) < before then
      last = middle
    else
      first = middle + 1
    end
  end
end
return redis.call('LRANGE', past, first, first + ARGV[3] - 1)
