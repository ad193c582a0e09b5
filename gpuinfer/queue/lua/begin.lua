#!lua flags=allow-oom
-- needs: states
-- Note which tasks a worker runs, and mark them as started. Or only report which of them have ended.
-- KEYS: in-flight hash
-- ARGV: the record of what runs (seqs, space separated; '': leave it unchanged), then (task id, started meta)
--       pairs; an empty meta leaves the task's state unchanged
-- Returns the 1-based positions of tasks that already have a final state: they must not run.
if ARGV[1] ~= '' then redis.call('HSET', KEYS[1], 'running', ARGV[1]) end
local done = {}
local waiting = {}
if #ARGV > 3 then
  -- needs: ends
  waiting = waiting_among(ARGV, 2, 2, #ARGV)
end
for i = 2, #ARGV, 2 do
  local state, err
  if not waiting[ARGV[i]] then state, err = state_of(ARGV[i]) end
  if FINAL[state or ''] then
    done[#done + 1] = i / 2
  elseif ARGV[i + 1] ~= '' and not err then
    write_passing(ARGV[i], ARGV[i + 1])
  end
end
return done
