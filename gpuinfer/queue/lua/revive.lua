#!lua
-- needs: clock places lists states again dead
-- Put a dead letter, or the message of a failed task, into its list again as if newly submitted.
-- KEYS: list
-- ARGV: task id, payload, the end of its state (write_waiting), '1' if its body is stored beside the list, '1' for a
--       failed task, then optionally its caller's quota (quota.lua)
-- Returns 1; 0 if the letter is gone, or the task waits or runs again; or why nothing was done: -1, the task has a
-- result; -2, its body is gone; -3, the list's key has another type.
local state, caller = state_of(ARGV[1]), string.match(KEYS[1], '@([^@\6]+)') or ''
-- Meanwhile the id was used for another caller's task, or this task was retried.
if state and (not FINAL[state] or owner_of(ARGV[1]) ~= caller) then return 0 end
if state == 'SUCCESS' then return -1 end
local kept = ARGV[5] == '1' and FAILED_TASKS or DEAD_LETTERS
if redis.call('HEXISTS', kept.letters, ARGV[1]) == 0 then return 0 end
if ARGV[4] == '1' and redis.call('EXISTS', BODY_PREFIX .. ARGV[1]) == 0 then return -2 end
local ahead = redis.pcall('LLEN', KEYS[1])
if type(ahead) == 'table' then return -3 end
if (ARGV[6] or '') ~= '' then
  -- needs: quota
  local why, charge = meter(caller, ARGV[6], 1)
  why = why or grant_key_room(caller, ARGV[6], 1, #ARGV[2] + redis.call('STRLEN', BODY_PREFIX .. ARGV[1]))
  if why then return redis.error_reply(why) end
  if charge then charge() end
end
drop_letter(kept, ARGV[1], true)
write_waiting(ARGV[1], KEYS[1], ahead, 1, ARGV[3])
redis.call('LPUSH', KEYS[1], ARGV[2])
local tier, model = index_list(KEYS[1])
if tier then
  count_body(tier, caller, ARGV[1])
  wake_for(tier, model, 1)
end
return 1
