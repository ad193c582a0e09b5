-- Library: the states of tasks. No other script writes under a result key, so that a final state is
-- written once, told to whoever waits, and counted, whatever has ended the task.
local FINAL = {SUCCESS = true, FAILURE = true, REVOKED = true}

-- Return what stands under a task's result key, as far as its status; an error when it is no text.
local function state_of(id)
  local text = redis.pcall('GETRANGE', RESULT_PREFIX .. id, 0, 31)
  if type(text) == 'table' then return nil, text.err end
  -- What a producer of ours has written is compared whole: cheaper than to look for a word in it.
  if text == PENDING_HEAD then return 'PENDING' end
  return string.match(text, '^{"status": ?"(%u+)"')
end

-- Write a state that passes: waiting, or started. Without a TTL: it is never evicted.
local function write_passing(id, meta, ...) return redis.call('SET', RESULT_PREFIX .. id, meta, ...) end

-- Publish metas to those who listen: each by its task's id, and on the reply channels of clients, once a
-- channel. One look tells who listens at all.
local function publish(ends)
  local channels, n = {}, 0
  local replies = {}
  for _, task in ipairs(ends) do
    n = n + 1
    channels[n] = RESULT_PREFIX .. task.id
  end
  for _, task in ipairs(ends) do
    local reply = task.reply
    if reply ~= '' then
      if not replies[reply] then
        replies[reply] = {}
        n = n + 1
        channels[n] = reply
      end
      table.insert(replies[reply], task.meta)
    end
  end
  for first = 1, n, 1000 do
    local found = redis.call('PUBSUB', 'NUMSUB', unpack(channels, first, math.min(first + 999, n)))
    for i = 1, #found, 2 do
      if found[i + 1] > 0 then
        local at = first + (i - 1) / 2
        if at <= #ends then
          redis.call('PUBLISH', found[i], ends[at].meta)
        else
          redis.call('PUBLISH', found[i], '[' .. table.concat(replies[found[i]], ',') .. ']')
        end
      end
    end
  end
end

-- Write final states. `ends` are {id, meta, keep, reply, label}; a task that has ended already is left as it
-- is. What is not kept is told to whoever waits, and what stood there is dropped.
-- Every foreign key is checked before the first write: a script that fails half way is not undone.
-- Returns how many were written, and {id, why, ...} of those whose key is not ours to write.
local function finish(ends, ttl)
  local open, refused, seen = {}, {}, {}
  for _, task in ipairs(ends) do
    local state, err = state_of(task.id)
    if seen[task.id] then state = 'SUCCESS' end
    seen[task.id] = true
    if err then
      refused[#refused + 1], refused[#refused + 2] = task.id, err
      task.refused = true
    end
    if not FINAL[state or ''] then open[#open + 1] = task end
  end
  if #open == 0 then return 0, refused end
  -- Changes nothing, and fails as SET would where this user may not write.
  local probed = redis.pcall('SETRANGE', RESULT_PREFIX .. 'probe', 0, '')
  if type(probed) == 'table' then return nil, probed end
  local counts, written = {}, 0
  for _, task in ipairs(open) do
    if task.refused then
      -- Told and counted all the same.
    elseif task.keep then
      redis.call('SET', RESULT_PREFIX .. task.id, task.meta, 'EX', ttl)
      written = written + 1
    else
      redis.call('DEL', RESULT_PREFIX .. task.id)
    end
    counts[task.label] = (counts[task.label] or 0) + 1
    if task.keep then
      local bytes = 'bytes' .. string.match(task.label, '^%S*(.*)$')
      counts[bytes] = (counts[bytes] or 0) + #task.meta
    end
    -- Later: what a chain sends on, a job's count, the outbox of web hooks, history, a stream's end.
  end
  for label, count in pairs(counts) do redis.call('HINCRBY', ENDED, label, count) end
  publish(open)
  return written, refused
end
