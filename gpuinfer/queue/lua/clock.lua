-- Library: the time by Redis's clock, in seconds; it is the same during a whole call.
local clock
local function now()
  if not clock then
    local time = redis.call('TIME')
    clock = time[1] + time[2] / 1000000
  end
  return clock
end
