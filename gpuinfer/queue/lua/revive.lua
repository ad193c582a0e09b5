#!lua
-- needs: clock places lists states again dead
-- Send a dead letter, or the message of a task that failed, to its list again as if newly submitted.
-- KEYS: list
-- ARGV: task id, payload, the end of its state (write_waiting), '1' when its body lies beside the list,
--       '1' for a task that failed, what its caller may submit, as quota.lua has it, or nothing
-- Returns 1, 0 when the letter is gone, or the task runs again by now, or why nothing was done: -1, the task has its result by now, which stands; -2,
-- its body is gone; -3, something else stands under the list's name.
local state, caller = state_of(ARGV[1]), string.match(KEYS[1], '@([^@\6]+)') or ''
-- Somebody has taken the id for another task meanwhile, or sent this one again.
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
