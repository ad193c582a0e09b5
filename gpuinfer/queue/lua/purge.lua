#!lua flags=allow-oom
-- needs: clock places lists states ends again chain keyed
-- Remove tasks from a list, or from the set of those that wait for their ETA, and end them.
-- KEYS: list or sorted set
-- ARGV: result ttl in seconds, 'list' or 'later', number of tasks, then for each, in the order of serving: SHA-1 of its
--       payload, task id ('': it cannot be read), meta, '1' to store the state, reply channel, label; then what follows
--       (chain.lua)
-- Returns how many were removed: the tasks at the head that are among the given ones. Tasks that a worker has claimed
-- meanwhile are not affected.
local queue, count = KEYS[1], tonumber(ARGV[3])
local last = 3 + 6 * count
local seen = {}
for i = 4, last, 6 do seen[ARGV[i]] = i + 1 end
local waiting = {}
if ARGV[2] == 'list' then
  local tail = redis.call('LRANGE', queue, -count, -1)
  for i = #tail, 1, -1 do waiting[#waiting + 1] = tail[i] end
else
  waiting = redis.call('ZRANGE', queue, 0, count - 1)
end
local flat, taken, ended = {}, 0, {}
for _, payload in ipairs(waiting) do
  local at = seen[redis.sha1hex(payload)]
  if not at then break end
  for part = at, at + 4 do flat[#flat + 1] = ARGV[part] end
  taken = taken + 1
  ended[(at + 1) / 6] = at
end
if taken == 0 then return 0 end
local following = {}
for _, one in ipairs(read_following(ARGV, last + 1)) do
  local at = ended[one.which]
  if at then
    one.success = outcome_of(one.id, ARGV[at + 1])
    following[#following + 1] = one
  end
end
local written, err = finish(flat, 1, 5, ARGV[1])
if not written then return err end
follow(following, ARGV[1])
for i = 1, taken do free_key(waiting[i], flat[5 * i - 4]) end
if ARGV[2] == 'list' then
  redis.call('RPOP', queue, taken)
else
  redis.call('ZREMRANGEBYRANK', queue, 0, taken - 1)
end
return taken
