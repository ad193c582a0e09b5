#!lua flags=no-writes,allow-oom
-- needs: clock keyed
-- Tell of ids that nothing is kept of whether they were ever submitted.
-- ARGV: for each id: the id, the prefix of the process that would have made it, the key of a client's own id
-- Returns 1 for each that was, and 0 for each of which that cannot be told.
local found = {}
for i = 1, #ARGV, 3 do
  local known = redis.call('ZSCORE', ORIGINS, ARGV[i + 1]) or holder_of(ARGV[i + 2], '') == ARGV[i]
  found[#found + 1] = known and 1 or 0
end
return found
