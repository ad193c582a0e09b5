#!lua flags=allow-oom
-- needs: states ends
-- Write the final state of a task that waits or runs. A task that has ended is left unchanged. A worker that runs it
-- will see the state: it begins no further part of the task, and drops the result of the part that runs.
-- KEYS: result key
-- ARGV: task id, meta, result ttl in seconds, reply channel of its client, meta to write if the task has no state
--       ('': none), as a plain producer's task may have its id only in its message, id prefix of the process that would
--       have created the id; then, if only one caller's task may be cancelled, that caller
-- Returns 1 if the state was written, 0 if not; -1 if the task is another caller's or unknown, and a caller was given.
local state, foreign = state_of(ARGV[1])
local owner = owner_of(ARGV[1])
if ARGV[7] and owner ~= ARGV[7] then return -1 end
if foreign or FINAL[state or ''] then return 0 end
-- The key has another program's text.
if not state and redis.call('GETRANGE', KEYS[1], 0, 0) ~= '' then return 0 end
-- No TTL while the message waits, which may take long in a paused queue or until its ETA.
local meta, label, ttl = ARGV[2], 'cancelled', nil
if not state then meta, label, ttl = ARGV[5], 'cancelled_unknown', ARGV[3] end
if meta == '' then return 0 end
-- The tasks of a known client process have a state from their submission on, so this one's state has expired.
if not state and redis.call('ZSCORE', ORIGINS, ARGV[6]) then return 0 end
-- Keep the task's caller in the new state.
if owner ~= '' then meta = string.gsub(meta, '^{"status":"REVOKED",', '%0"caller":"' .. owner .. '",') end
-- allow-oom lets this script write to a full Redis. A made-up id must not be stored there, so it is refused here.
if not state then
  local memory = redis.call('INFO', 'memory')
  local function value(name) return tonumber(string.match(memory, '\n' .. name .. ':(%d+)') or 0) end
  local most = value('maxmemory')
  if most > 0 and value('used_memory') - value('mem_not_counted_for_evict') > most then
    return redis.error_reply("OOM command not allowed when used memory > 'maxmemory'.")
  end
end
local written, err = finish({ARGV[1], meta, '1', ARGV[4], label}, 1, 5, ttl)
return written or err
