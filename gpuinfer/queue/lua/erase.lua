#!lua flags=allow-oom
-- needs: states dead
-- Forget a task that has ended: its result, and what is kept of it to be sent again.
-- KEYS: result key
-- ARGV: task id; then, where that matters, whose task it must be
-- Returns 1; 0: nothing is known of it, or it is another's; or why nothing was done: -1, it has not ended; -2, it was cancelled, and its
-- message still waits: the worker that comes upon that must find that it was.
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
