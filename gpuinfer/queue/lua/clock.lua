-- Library: the time by Redis's clock, in seconds, which is the same for all of a call.
local clock
local function now()
  if not clock then
    local time = redis.call('TIME')
    clock = time[1] + time[2] / 1000000
  end
  return clock
end

-- Tell whether anybody is idle, of whatever group: while nobody is, nobody is counted or looked for.
