#!lua flags=allow-oom
-- needs: states
-- Write the final states of tasks, publish them, remove the tasks from flight, and send what follows, in one step.
-- KEYS: in-flight hash
-- ARGV: result ttl in seconds, '1' if nothing runs now, number of tasks, limits of the kept messages of failed tasks
--       (number, bytes and seconds, space separated; '': none are kept), then for each task: seq, task id, meta, '1' to
--       store the state ('2': it is stored under a key of its own; '': the task has its state already), reply channel,
--       label; an empty seq means not in flight; an empty id leaves all states unchanged; then what follows (chain.lua)
-- Returns the number of states written, {id, why, ...} of tasks whose key cannot be written, and {id, why, ...} of the
-- successors that were refused.
local last = 4 + 6 * ARGV[3]
local failed
-- When the call is repeated, an end that is not stored was already published if its task is no longer in flight.
local skipped
for i = 5, last, 6 do
  if ARGV[i + 3] == '' then
    skipped = skipped or {}
    skipped[i], ARGV[i + 1] = ARGV[i + 1], ''
  elseif ARGV[i + 3] == '0' and ARGV[i] ~= '' and redis.call('HEXISTS', KEYS[1], ARGV[i]) == 0 then
    ARGV[i + 1] = ''
  elseif string.byte(ARGV[i + 5]) == 102 and ARGV[i] ~= '' and ARGV[i + 3] ~= '0' then -- failed
    failed = failed or {}
    failed[#failed + 1] = i
  end
end
local kept_inputs, keep_inputs
if failed and ARGV[4] ~= '' and not may('HSET', FAILED, '', '') then
  -- needs: dead
  kept_inputs = {}
  local most, bytes, age = string.match(ARGV[4], '^(%d+) (%d+) (%d+)$')
  most, bytes, age = tonumber(most), tonumber(bytes), tonumber(age)
  for _, i in ipairs(failed) do
    local id = ARGV[i + 1]
    if id ~= '' and not FINAL[state_of(id) or ''] then
      local payload, list = unpack(redis.call('HMGET', KEYS[1], ARGV[i], ARGV[i] .. ':list'))
      local size = payload and list and #payload + redis.call('STRLEN', BODY_PREFIX .. id)
      if size and size <= bytes then kept_inputs[id] = list .. '\n' .. payload end
    end
  end
  keep_inputs = function()
    for id, letter in pairs(kept_inputs) do add_letter(FAILED_TASKS, id, letter) end
    for _ = 0, #failed, 100 do trim_letters(FAILED_TASKS, most, bytes, age) end
  end
end
local follow_ends
if last < #ARGV then
  -- needs: ends clock places lists again chain
  local following = read_following(ARGV, last + 1)
  -- An end with successors is written only while its task is in flight here, so that one call does both, or neither.
  for _, one in ipairs(following) do
    local i = 6 * one.which - 1
    if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 0 then
      ARGV[i + 1] = ''
    else
      one.success = outcome_of(one.id, ARGV[i + 2])
    end
  end
  follow_ends = function() return follow(following, ARGV[1]) end
end
-- This changes nothing, but fails if the call below would: a task must not end and stay in flight.
redis.call('HDEL', KEYS[1], '')
local written, refused
if last == 10 and not follow_ends and ARGV[6] ~= '' and ARGV[8] == '1' and #ARGV[7] <= 4096 then
  written, refused = finish_one(ARGV[6], ARGV[7], ARGV[9], ARGV[10], ARGV[1])
end
if not written and not refused then
  -- needs: ends
  written, refused = finish(ARGV, 6, 6, ARGV[1], last, kept_inputs)
end
if not written then return refused end
if skipped then
  for _, id in pairs(skipped) do
    if state_of(id) == 'REVOKED' then
      expire_state(id, ARGV[1])
      revoked = revoked or {}
      revoked[id] = true
    end
  end
end
if revoked then
  -- needs: keyed
  for i = 5, last, 6 do
    local id = skipped and skipped[i] or ARGV[i + 1]
    if revoked[id] then free_key(redis.call('HGET', KEYS[1], ARGV[i]) or '', id) end
  end
end
if keep_inputs then keep_inputs() end
local unsent = follow_ends and follow_ends() or {}
local gone, n = {}, 0
for i = 5, last, 6 do
  local seq = ARGV[i]
  if seq ~= '' then
    gone[n + 1], gone[n + 2] = seq, seq .. ':list'
    n = n + 2
  end
end
-- A crash after this point is not charged to the last batch.
if ARGV[2] == '1' then gone[n + 1] = 'running' end
for first = 1, #gone, 1000 do
  redis.call('HDEL', KEYS[1], unpack(gone, first, math.min(first + 999, #gone)))
end
return {written, refused, unsent}
