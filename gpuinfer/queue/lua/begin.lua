#!lua flags=allow-oom
-- needs: states
-- Note which tasks a worker runs, and mark them as started.
-- KEYS: in-flight hash
-- ARGV: the record of what runs (seqs, space separated), then (task id, started meta) pairs; an empty meta
--       marks nothing
-- Returns the 1-based positions of tasks whose final state is already written: they must not run.
redis.call('HSET', KEYS[1], 'running', ARGV[1])
local done = {}
for i = 2, #ARGV, 2 do
  local state, err = state_of(ARGV[i])
  if FINAL[state or ''] then
    done[#done + 1] = i / 2
  elseif ARGV[i + 1] ~= '' and not err then
    write_passing(ARGV[i], ARGV[i + 1])
  end
end
return done
