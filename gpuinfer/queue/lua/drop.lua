#!lua flags=allow-oom
-- needs: dead
-- Drop dead letters.
-- ARGV: task ids
-- Returns how many there were.
local count = 0
for _, id in ipairs(ARGV) do count = count + drop_letter(DEAD_LETTERS, id) end
return count
