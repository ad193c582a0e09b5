#!lua flags=allow-oom
-- needs: dead
-- Drop the dead letters that are over a bound, the oldest first.
-- ARGV: letters kept at most, bytes of them, seconds
-- Returns the ids of those dropped: a hundred at most.
return trim_letters(tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]))
