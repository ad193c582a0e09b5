#!lua flags=allow-oom
-- needs: clock places lists
-- Add lists to the index that hold work nobody has told of: plain producers only append.
-- KEYS: lists
-- Returns how many hold work.
local found = 0
for _, list in ipairs(KEYS) do
  local size = redis.pcall('LLEN', list)
  if type(size) == 'number' and size > 0 then
    index_list(list, true)
    found = found + 1
  end
end
return found
