#!lua flags=allow-oom
-- needs: states
-- Write the final state of a task that waits or runs; one that has ended is left alone. Its worker finds out: it
-- begins no other part of it, and what comes of the part that runs is dropped.
-- KEYS: result key
-- ARGV: task id, meta, result ttl in seconds, reply channel of its client
-- Returns 1 when the state was written.
local state = state_of(ARGV[1])
if not state or FINAL[state] then return 0 end
local written, err = finish({ARGV[1], ARGV[2], '1', ARGV[4], 'cancelled'}, 1, 5, ARGV[3])
return written or err
