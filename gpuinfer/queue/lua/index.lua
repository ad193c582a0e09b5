#!lua flags=allow-oom
-- needs: clock places lists
-- Add lists that have tasks to the index: plain producers do not do that.
-- KEYS: lists
-- Returns how many of them have tasks.
local found = 0
for _, list in ipairs(KEYS) do
  local size = redis.pcall('LLEN', list)
  if type(size) == 'number' and size > 0 then
    index_list(list, true)
    found = found + 1
  end
end
return found
