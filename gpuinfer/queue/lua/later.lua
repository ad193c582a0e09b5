-- Library: tasks with an ETA, which wait in sorted sets until they are due, by Redis's clock. Needs lists.
-- Each list has its own set, payload -> due; LATER has list -> its earliest due; DUE is the earliest of all, so that
-- reading one string tells whether any task is due.

-- Update DUE.
local function note_due()
  local first = redis.call('ZRANGE', LATER, 0, 0, 'WITHSCORES')
  if first[2] then
    redis.call('SET', DUE, first[2])
  else
    redis.call('DEL', DUE)
  end
end

-- Put tasks into the set of a list. `entries` is {due, payload, ...}. Returns an error if the set's key has another
-- type. LATER is updated with LT, from the given times only, because clients have no right to read the set.
local function put_later(list, entries)
  local earliest = entries[1]
  for first = 1, #entries, 1000 do
    local part = {unpack(entries, first, math.min(first + 999, #entries))}
    local answer = redis.pcall('ZADD', LATER_PREFIX .. list, unpack(part))
    if type(answer) == 'table' then return answer end
  end
  for at = 1, #entries, 2 do
    if tonumber(entries[at]) < tonumber(earliest) then earliest = entries[at] end
  end
  redis.call('ZADD', LATER, 'LT', earliest, list)
  note_due()
end

-- Count the tasks in all sets.
local function count_later()
  local count = 0
  for _, list in ipairs(redis.call('ZRANGE', LATER, 0, -1)) do
    local size = redis.pcall('ZCARD', LATER_PREFIX .. list)
    count = count + (tonumber(size) or 0)
  end
  return count
end

-- Update LATER for a list after tasks have left its set.
local function note_list(list)
  local first = redis.call('ZRANGE', LATER_PREFIX .. list, 0, 0, 'WITHSCORES')
  if first[2] then
    redis.call('ZADD', LATER, first[2], list)
  else
    redis.call('ZREM', LATER, list)
  end
end

-- Append due tasks to their lists, the earliest first, up to a total number of tasks and bytes. If a list's key has
-- another type, its tasks stay, and are tried again after a while. Returns the number of tasks moved.
local function move_due(tasks, bytes)
  local moved, lists = 0, redis.call('ZRANGE', LATER, '-inf', now(), 'BYSCORE', 'LIMIT', 0, 100)
  for _, list in ipairs(lists) do
    local set, few, count = LATER_PREFIX .. list, 1, 0
    local refused = false
    while moved < tasks and bytes > 0 and not refused do
      local due = redis.pcall('ZRANGE', set, '-inf', now(), 'BYSCORE', 'LIMIT', 0, math.min(few, tasks - moved))
      if #due == 0 and not due.err then break end
      refused = due.err or type(redis.pcall('LPUSH', list, unpack(due))) == 'table'
      if refused then break end
      redis.call('ZREMRANGEBYRANK', set, 0, #due - 1)
      for _, payload in ipairs(due) do bytes = bytes - #payload end
      moved, count = moved + #due, count + #due
      few = math.max(1, math.min(1000, math.floor(bytes / (#due[#due] + 1))))
    end
    if refused then
      redis.call('ZADD', LATER, now() + LATER_RETRY, list)
    else
      note_list(list)
    end
    if count > 0 then
      local tier, model = index_list(list)
      if tier then wake_for(tier, model, count) end
    end
  end
  if #lists > 0 then note_due() end
  return moved
end
