-- Library: the states of tasks. Only this library and ends.lua write result keys, so that a final state is written
-- once, published, and counted, no matter what ended the task.
local FINAL = {SUCCESS = true, FAILURE = true, REVOKED = true}

-- Return the status in a task's state; nil if there is none; nil and an error if the key is not a string.
local function state_of(id)
  local text = redis.pcall('GETRANGE', RESULT_PREFIX .. id, 0, 31)
  if type(text) == 'table' then return nil, text.err end
  -- For the state written at submission, comparing its whole beginning is cheaper than a pattern.
  if text == PENDING_HEAD then return 'PENDING' end
  return string.match(text, '^{"status": ?"(%u+)"')
end

-- Return a task's caller, from its state; '' if there is none, or no state. The caller's name comes before anything
-- that a client or a model has written (results.py, submit.lua), so it can be trusted.
local function owner_of(id)
  local text = redis.pcall('GETRANGE', RESULT_PREFIX .. id, 0, 127)
  if type(text) == 'table' then return '' end
  return string.match(text, '^{"status":"%u+","caller":"([^"\\]+)"')
    or string.match(text, '^{"status": "PENDING", "result": null,"about":{"caller":"([^"\\]+)"')
    or ''
end

-- Return the value of a task's result key; '' if it is not a string.
local function text_of(id)
  local text = redis.pcall('GETRANGE', RESULT_PREFIX .. id, 0, -1)
  return type(text) == 'string' and text or ''
end

-- Give a TTL to a final state that has none, after the task's message was dropped.
local function expire_state(id, ttl) return redis.call('EXPIRE', RESULT_PREFIX .. id, ttl, 'NX') end

-- Write a state that is not final: waiting, or started. It has no TTL, so it is never evicted.
local function write_passing(id, meta, ...) return redis.call('SET', RESULT_PREFIX .. id, meta, ...) end

-- Delete a task's result key; return the number of keys deleted.
local function drop_state(id) return redis.call('UNLINK', RESULT_PREFIX .. id) end

-- Return an error if this user may not run a command. Checked first, because a script that fails half way is not
-- undone.
local function may(...)
  if not redis.acl_check_cmd(...) then
    return redis.error_reply('NOPERM this user may not run: ' .. table.concat({...}, ' '))
  end
end

-- Add a task's large body to the byte counts of its tier and caller; it counts until the task ends.
local function count_body(tier, caller, id)
  local size = redis.call('STRLEN', BODY_PREFIX .. id)
  local account = tier .. ' ' .. size .. (caller == '' and '' or ' ' .. caller)
  if size > 0 and redis.call('HSETNX', BODIES, id, account) == 1 then
    redis.call('HINCRBY', BODY_BYTES, tier, size)
    if caller ~= '' then redis.call('HINCRBY', BODY_BYTES, '@' .. caller, size) end
  end
end

-- Count ends with one label, and the bytes of those stored (nil: none). Returns an error if the counters cannot be
-- written.
local function count_ends(label, count, bytes)
  local answer = redis.pcall('HINCRBY', ENDED, label, count)
  if type(answer) == 'table' then return answer end
  if bytes then redis.pcall('HINCRBY', ENDED, 'bytes' .. string.match(label, '^%S*(.*)$'), bytes) end
end

-- Add entries to a list of the history, and drop the oldest now and then. An error here must not keep a task from
-- ending.
local function remember(past, entries, most)
  for first = 1, #entries, 1000 do
    local length = redis.pcall('LPUSH', past, unpack(entries, first, math.min(first + 999, #entries)))
    if type(length) == 'number' and length > most + HISTORY_SLACK then redis.pcall('LTRIM', past, 0, most - 1) end
  end
end

-- Add ends to the history: {label, id, meta, ...}. An entry is 'microseconds label\nid\nerror', plus '\ncaller' if
-- there is one. The times are unique, because a call takes longer than a microsecond per task. Made-up ids are left
-- out.
local function note_ends(ends)
  local time = redis.call('TIME')
  local at, entries, failures = time[1] * 1000000 + time[2], {}, {}
  for i = 1, #ends, 3 do
    local label, id = ends[i], ends[i + 1]
    if #id <= 200 and label ~= 'cancelled_unknown' and not string.find(id, '\n', 1, true) then
      local entry = string.format('%.0f %s\n%s\n', at, label, id)
      local caller = string.match(ends[i + 2], '^{"status":"%u+","caller":"([^"\\]+)"')
      local failed = string.find(label, '^[fdn]') -- failed, dead, not_run
      if failed then
        entry = entry .. (string.match(string.sub(ends[i + 2], 1, 200), '"exc_type": ?"(%w+)"') or '')
      end
      if caller then entry = entry .. '\n' .. caller end
      if failed then failures[#failures + 1] = entry end
      entries[#entries + 1] = entry
      at = at + 1
    end
  end
  remember(HISTORY, entries, HISTORY_MOST)
  remember(FAILURES, failures, FAILURES_MOST)
end

-- The ids that `finish` found or made REVOKED, as a set, or nil. Their idempotency keys are to be removed.
local revoked

-- Write the final state of one task, as `finish` does, which takes half as long again because of its tables. Returns
-- nothing if `finish` has to do it: the task is revoked or has already ended, a large body may have to be dropped, or
-- the key cannot be written.
local function finish_one(id, meta, reply, label, ttl)
  local state, err = state_of(id)
  if string.find(meta, '^{"status": ?"REVOKED"') then return end
  if err or FINAL[state or ''] or redis.call('EXISTS', BODIES) == 1 then return end
  local key, ours = RESULT_PREFIX .. id, string.sub(reply, 1, #REPLY_PREFIX) == REPLY_PREFIX
  local denied = may('SET', key, '', 'EX', ttl)
    or may('PUBLISH', key, '')
    or ours and may('PUBLISH', reply, '')
    or count_ends(label, 1, #meta)
  if denied then return nil, denied end
  redis.call('SET', key, meta, 'EX', ttl)
  -- Publishing costs no more than asking whether anyone listens.
  redis.call('PUBLISH', key, meta)
  if ours then
    local channel = reply
    redis.call('PUBLISH', channel, '[' .. meta .. ']')
  end
  note_ends({label, id, meta})
  return 1, {}
end
