-- Library: the states of tasks. No other script writes under a result key, so that a final state is
-- written once, told to the callers who wait, and counted, whatever has ended the task.
local FINAL = {SUCCESS = true, FAILURE = true, REVOKED = true}

-- Return what stands under a task's result key, as far as its status; an error when it is no text.
local function state_of(id)
  local text = redis.pcall('GETRANGE', RESULT_PREFIX .. id, 0, 31)
  if type(text) == 'table' then return nil, text.err end
  -- What a producer of ours has written is compared whole: cheaper than to look for a word in it.
  if text == PENDING_HEAD then return 'PENDING' end
  return string.match(text, '^{"status": ?"(%u+)"')
end

-- Return whose task it is, by its state; '' for nobody's in particular, and for one that nothing is known of. The name
-- stands where nothing can be that a client or a model has written (results.py, submit.lua).
local function owner_of(id)
  local text = redis.pcall('GETRANGE', RESULT_PREFIX .. id, 0, 127)
  if type(text) == 'table' then return '' end
  return string.match(text, '^{"status":"%u+","caller":"([^"\\]+)"')
    or string.match(text, '^{"status": "PENDING", "result": null,"about":{"caller":"([^"\\]+)"')
    or ''
end

-- Return all that stands under a task's result key; '' for what is no text.
local function text_of(id)
  local text = redis.pcall('GETRANGE', RESULT_PREFIX .. id, 0, -1)
  return type(text) == 'string' and text or ''
end

-- Let a final state that stands without a time to live have one: its message was dropped.
local function expire_state(id, ttl) return redis.call('EXPIRE', RESULT_PREFIX .. id, ttl, 'NX') end

-- Write a state that passes: waiting, or started. Without a TTL: it is never evicted.
local function write_passing(id, meta, ...) return redis.call('SET', RESULT_PREFIX .. id, meta, ...) end

-- Drop what stands under a task's result key; return how many keys that were.
local function drop_state(id) return redis.call('UNLINK', RESULT_PREFIX .. id) end

-- Return an error unless this user may run a command: a script refused half way is not undone.
local function may(...)
  if not redis.acl_check_cmd(...) then
    return redis.error_reply('NOPERM this user may not run: ' .. table.concat({...}, ' '))
  end
end

-- A large body lies beside its list, and is on account, by tier and by caller, until its task has ended.
local function count_body(tier, caller, id)
  local size = redis.call('STRLEN', BODY_PREFIX .. id)
  local account = tier .. ' ' .. size .. (caller == '' and '' or ' ' .. caller)
  if size > 0 and redis.call('HSETNX', BODIES, id, account) == 1 then
    redis.call('HINCRBY', BODY_BYTES, tier, size)
    if caller ~= '' then redis.call('HINCRBY', BODY_BYTES, '@' .. caller, size) end
  end
end

-- Count ends of one label, and the bytes of those that are kept (nil: none is). Returns an error where the counters are
-- not ours to write.
local function count_ends(label, count, bytes)
  local answer = redis.pcall('HINCRBY', ENDED, label, count)
  if type(answer) == 'table' then return answer end
  if bytes then redis.pcall('HINCRBY', ENDED, 'bytes' .. string.match(label, '^%S*(.*)$'), bytes) end
end

-- Add entries to a list of the history, and drop the oldest now and then. What Redis refuses here keeps no task from its
-- end.
local function remember(past, entries, most)
  for first = 1, #entries, 1000 do
    local length = redis.pcall('LPUSH', past, unpack(entries, first, math.min(first + 999, #entries)))
    if type(length) == 'number' and length > most + HISTORY_SLACK then redis.pcall('LTRIM', past, 0, most - 1) end
  end
end

-- Note ends in the history: {label, id, meta, ...}. An entry is 'microseconds label\nid\nerror', and no two have one
-- time: a call takes longer than a microsecond a task. Of a caller's task, its name is the last line. An id that somebody
-- has made up is not noted.
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

-- The ids that `finish` has found, or made, REVOKED: a set, or nil. Their idempotency keys stand for nothing.
local revoked

-- Write the final state of one task, as `finish` does, which takes half as long again for its tables. Returns nothing
-- where that has to do it: the task is revoked, or has ended already, a large body may have to be dropped, or the key
-- is not ours to write.
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
  -- To publish costs no more than to ask who listens.
  redis.call('PUBLISH', key, meta)
  if ours then
    local channel = reply
    redis.call('PUBLISH', channel, '[' .. meta .. ']')
  end
  note_ends({label, id, meta})
  return 1, {}
end
