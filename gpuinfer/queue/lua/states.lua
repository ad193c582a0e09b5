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

-- Publish metas to a client as one list; large ones in several.
local function reply_with(channel, metas)
  local first, size = 1, 0
  for i, meta in ipairs(metas) do
    size = size + #meta
    if i == #metas or size > 1048576 then
      redis.call('PUBLISH', channel, '[' .. table.concat(metas, ',', first, i) .. ']')
      first, size = i + 1, 0
    end
  end
end

-- Tell the ends of tasks to those who listen: by their ids, and on the reply channels of clients, once a channel.
-- One look tells who listens at all. `channels` are those of the tasks, `metas` what is told.
local function tell(channels, metas, replies)
  local tasks, n = #channels, #channels
  for reply in pairs(replies) do
    n = n + 1
    channels[n] = reply
  end
  for first = 1, n, 1000 do
    local found = redis.call('PUBSUB', 'NUMSUB', unpack(channels, first, math.min(first + 999, n)))
    for i = 2, #found, 2 do
      if found[i] > 0 then
        local at, channel = first + i / 2 - 1, found[i - 1]
        if at <= tasks then
          redis.call('PUBLISH', channel, metas[at])
        else
          reply_with(channel, replies[channel])
        end
      end
    end
  end
end

-- Write final states. From `first` on, each `step` entries of `flat` begin with: id ('': none), meta, '1' to keep
-- it, reply channel ('': none), label. A task that has ended already is left as it is. What is not kept is told
-- to whoever waits, and what stood there is dropped.
-- Every foreign key is checked before the first write: a script that fails half way is not undone.
-- Returns how many were written, and {id, why, ...} of those whose key is not ours to write; or nil, and an error.
local function finish(flat, first, step, ttl)
  local open, n, refused, foreign, seen = {}, 0, {}, {}, {}
  for i = first, #flat, step do
    local id = flat[i]
    if id ~= '' and not seen[id] then
      seen[id] = true
      local state, err = state_of(id)
      if err then
        refused[#refused + 1], refused[#refused + 2] = id, err
        foreign[i] = true
      end
      if not (state and FINAL[state]) then
        n = n + 1
        open[n] = i
      end
    end
  end
  if n == 0 then return 0, refused end
  -- Changes nothing, and fails as SET would where this user may not write.
  local probed = redis.pcall('SETRANGE', RESULT_PREFIX .. 'probe', 0, '')
  if type(probed) == 'table' then return nil, probed end
  local written, counts, bytes, channels, metas, replies = 0, {}, {}, {}, {}, {}
  for k = 1, n do
    local i = open[k]
    local key, meta, reply, label = RESULT_PREFIX .. flat[i], flat[i + 1], flat[i + 3], flat[i + 4]
    channels[k], metas[k] = key, meta
    counts[label] = (counts[label] or 0) + 1
    if foreign[i] then
      -- Told and counted all the same.
    elseif flat[i + 2] == '1' then
      redis.call('SET', key, meta, 'EX', ttl)
      written = written + 1
      bytes[label] = (bytes[label] or 0) + #meta
    else
      redis.call('DEL', key)
    end
    if reply ~= '' then
      local told = replies[reply]
      if told then
        told[#told + 1] = meta
      else
        replies[reply] = {meta}
      end
    end
    -- Later: what a chain sends on, a job's count, the outbox of web hooks, history, a stream's end.
  end
  for label, count in pairs(counts) do redis.call('HINCRBY', ENDED, label, count) end
  for label, size in pairs(bytes) do
    redis.call('HINCRBY', ENDED, 'bytes' .. string.match(label, '^%S*(.*)$'), size)
  end
  tell(channels, metas, replies)
  return written, refused
end
