#!lua
-- needs: clock places lists states dead
-- Send a dead letter to its list again as if newly submitted.
-- KEYS: list
-- ARGV: task id, payload, pending meta
-- Returns 1, 0 when the letter is gone, or -1 when the task has its result by now: that stands.
if state_of(ARGV[1]) == 'SUCCESS' then return -1 end
if drop_letter(ARGV[1], true) == 0 then return 0 end
write_passing(ARGV[1], ARGV[3])
redis.call('LPUSH', KEYS[1], ARGV[2])
local tier, model = index_list(KEYS[1])
if tier then
  count_body(tier, ARGV[1])
  wake_for(tier, model, 1)
end
return 1
