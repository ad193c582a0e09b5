-- Library: write the ends of many tasks, and announce them. Needs states.

-- The ids are every `step`-th entry of `flat`, from `first` to `last`. Return those that still have the state written
-- at their submission, as a set. One MGET of 64 ids costs less than 64 calls, but reads whole results of tasks that
-- have ended. So this stops after the first MGET that finds another state; use `state_of` for ids that are not in the
-- set.
local function waiting_among(flat, first, step, last)
  local waiting, width = {}, 64 * step
  for from = first, last, width do
    local ids, keys, n = {}, {}, 0
    for i = from, math.min(from + width - 1, last), step do
      if flat[i] ~= '' then
        n = n + 1
        ids[n], keys[n] = flat[i], RESULT_PREFIX .. flat[i]
      end
    end
    if n < 2 then break end
    local texts, others = redis.call('MGET', unpack(keys)), false
    for k = 1, n do
      if texts[k] and string.sub(texts[k], 1, 32) == PENDING_HEAD then
        waiting[ids[k]] = true
      else
        others = true
      end
    end
    if others then break end
  end
  return waiting
end

-- Publish metas to a client as one list, or as several lists if they are large.
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

-- Publish the ends of tasks: on the tasks' own channels, and once on each client's reply channel. PUBSUB NUMSUB tells
-- which channels have a listener. `channels` are the tasks' channels, `metas` their messages; a meta of false has to be
-- read from the task's result key, which has the same name as its channel.
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
          local key = channel
          redis.call('PUBLISH', channel, metas[at] or redis.call('GET', key))
        else
          reply_with(channel, replies[channel])
        end
      end
    end
  end
end

-- Remove the large bodies of these tasks from the counts, and drop them, except those in `kept`: true for all, or a set
-- of ids.
local function drop_bodies(ids, kept)
  for first = 1, #ids, 1000 do
    local last = math.min(first + 999, #ids)
    for i, counted in ipairs(redis.call('HMGET', BODIES, unpack(ids, first, last))) do
      if counted then
        local id = ids[first + i - 1]
        local tier, size, caller = string.match(counted, '^(%a+) (%d+) ?(.*)$')
        redis.call('HDEL', BODIES, id)
        redis.call('HINCRBY', BODY_BYTES, tier, '-' .. size)
        if caller ~= '' and redis.call('HINCRBY', BODY_BYTES, '@' .. caller, '-' .. size) <= 0 then
          redis.call('HDEL', BODY_BYTES, '@' .. caller)
        end
        if not (kept == true or kept and kept[id]) then redis.call('UNLINK', BODY_PREFIX .. id) end
      end
    end
  end
end

-- Write final states. From `first` to `last` (nil: the end of `flat`), each `step` entries of `flat` begin with: id
-- ('': none), meta, '1' to store it, reply channel ('': none), label.
-- - A task that has already ended keeps its state.
-- - '0': the meta is only published, and the task's state is deleted.
-- - '2': the meta is large, and is stored under a key of its own, which expires within a minute. That key is renamed,
--   so the meta does not pass through Lua; the argument is a notice for the reply channel.
-- - Large bodies are dropped, except those in `keep_bodies`.
-- - Without `ttl` the state has no TTL until the task's message is dropped, by a call with `ttl`: a cancelled task must
--   not run, no matter how late its message is claimed.
-- The type of each key, and this user's right to each command, are checked before the first write, because a script
-- that fails half way is not undone.
-- Returns the number of states written, and {id, why, ...} of tasks whose key cannot be written; or nil and an error.
local function finish(flat, first, step, ttl, last, keep_bodies)
  local open, n, refused, foreign, seen, drops, replied = {}, 0, {}, {}, {}, false, false
  local sizes, beside = {}, false
  last = last or #flat
  local waiting = waiting_among(flat, first, step, last)
  for i = first, last, step do
    local id = flat[i]
    if id ~= '' and not seen[id] then
      seen[id] = true
      local state, err
      if not waiting[id] then state, err = state_of(id) end
      if err then
        if not string.find(err, 'WRONGTYPE', 1, true) then return nil, redis.error_reply(err) end
        refused[#refused + 1], refused[#refused + 2] = id, err
        foreign[i] = true
      end
      -- The caller drops its message now.
      if state == 'REVOKED' and ttl then
        redis.call('EXPIRE', RESULT_PREFIX .. id, ttl, 'NX')
        revoked = revoked or {}
        revoked[id] = true
      end
      if not (state and FINAL[state]) then
        n = n + 1
        open[n] = i
        drops = drops or flat[i + 2] == '0'
        if flat[i + 2] == '2' then
          beside, sizes[i] = true, redis.call('STRLEN', BESIDE_PREFIX .. id)
          if sizes[i] == 0 then return nil, redis.error_reply('BESIDE nothing of ' .. id) end
        end
        replied = replied or flat[i + 3] ~= ''
      end
    end
  end
  if n == 0 then return 0, refused end
  local key = RESULT_PREFIX .. 'x'
  local bodies = redis.call('EXISTS', BODIES) == 1
  local denied = may('SET', key, '')
    or may('PUBLISH', key, '')
    or may('PUBSUB', 'NUMSUB', key)
    or drops and may('DEL', key)
    or beside and (may('RENAME', BESIDE_PREFIX .. 'x', key) or may('EXPIRE', key, ttl) or may('GET', key))
    or replied and may('PUBLISH', REPLY_PREFIX .. 'x', '')
    or bodies
      and (may('HDEL', BODIES, '') or may('HINCRBY', BODY_BYTES, '', 0) or may('HDEL', BODY_BYTES, '')
        or may('UNLINK', BODY_PREFIX))
  if denied then return nil, denied end
  local counts, bytes = {}, {}
  for k = 1, n do
    local i = open[k]
    local label = flat[i + 4]
    counts[label] = (counts[label] or 0) + 1
    if flat[i + 2] ~= '0' and not foreign[i] then bytes[label] = (bytes[label] or 0) + (sizes[i] or #flat[i + 1]) end
  end
  -- If this fails, it does so in its first call, before anything is written.
  local counted = false
  for label, count in pairs(counts) do
    local uncounted = count_ends(label, count, bytes[label])
    if uncounted and not counted then return nil, uncounted end
    counted = true
  end
  local written, channels, metas, replies, ids, ended = 0, {}, {}, {}, {}, {}
  for k = 1, n do
    local i = open[k]
    ids[k] = flat[i]
    local meta, reply = flat[i + 1], flat[i + 3]
    key = RESULT_PREFIX .. flat[i]
    channels[k], metas[k] = key, meta
    if string.find(meta, '^{"status": ?"REVOKED"') then
      revoked = revoked or {}
      revoked[ids[k]] = true
    end
    if foreign[i] then
      -- Only published and counted.
    elseif flat[i + 2] == '1' then
      if ttl then
        redis.call('SET', key, meta, 'EX', ttl)
      else
        redis.call('SET', key, meta)
      end
      written = written + 1
    elseif flat[i + 2] == '2' then
      redis.call('RENAME', BESIDE_PREFIX .. flat[i], key)
      redis.call('EXPIRE', key, ttl)
      metas[k], written = false, written + 1
    else
      redis.call('DEL', key)
    end
    -- Publish only on our clients' reply channels.
    if string.sub(reply, 1, #REPLY_PREFIX) == REPLY_PREFIX then
      local told = replies[reply]
      if told then
        told[#told + 1] = meta
      else
        replies[reply] = {meta}
      end
    end
    ended[3 * k - 2], ended[3 * k - 1], ended[3 * k] = flat[i + 4], flat[i], meta
  end
  note_ends(ended)
  if bodies then drop_bodies(ids, keep_bodies) end
  tell(channels, metas, replies)
  return written, refused
end
