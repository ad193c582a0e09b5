#!lua flags=allow-oom
-- needs: states dead
-- Delete a task that has ended: its result, and the message kept for a retry.
-- KEYS: result key
-- ARGV: task id; then, if only one caller's task may be deleted, that caller
-- Returns 1 if it was deleted; 0 if it is unknown or another caller's; -1 if it has not ended; -2 if it was cancelled
-- but its message still waits: the worker that claims the message needs to see the state.
local state, foreign = state_of(ARGV[1])
if foreign then return redis.error_reply(foreign) end
if ARGV[2] then
  local owner = state and owner_of(ARGV[1]) or owner_of_letter(ARGV[1])
  if owner ~= ARGV[2] then return 0 end
end
if state and not FINAL[state] then return -1 end
if state == 'REVOKED' and redis.call('TTL', KEYS[1]) < 0 then return -2 end
local letter, failed = drop_letter(DEAD_LETTERS, ARGV[1]), drop_letter(FAILED_TASKS, ARGV[1])
return math.max(letter, failed, drop_state(ARGV[1]))
