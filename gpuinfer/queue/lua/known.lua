#!lua flags=no-writes,allow-oom
-- needs: clock keyed
-- Tell whether ids of tasks that have no state were ever submitted.
-- ARGV: for each id: the id, the id prefix of the process that would have created it, the key for a client's own id
-- Returns for each: 1 if it was submitted, 0 if that is not known.
local found = {}
for i = 1, #ARGV, 3 do
  local known = redis.call('ZSCORE', ORIGINS, ARGV[i + 1]) or holder_of(ARGV[i + 2], '') == ARGV[i]
  found[#found + 1] = known and 1 or 0
end
return found
