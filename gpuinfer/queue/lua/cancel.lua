#!lua flags=allow-oom
-- needs: states
-- Write the final state of a task that no worker has begun; one that runs or has ended is left alone.
-- KEYS: result key
-- ARGV: task id, meta, result ttl in seconds, reply channel of its client
-- Returns 1 when the state was written.
if state_of(ARGV[1]) ~= 'PENDING' then return 0 end
local written, err = finish({ARGV[1], ARGV[2], '1', ARGV[4], 'cancelled'}, 1, 5, ARGV[3])
return written or err
