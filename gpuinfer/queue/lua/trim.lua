#!lua flags=allow-oom
-- needs: dead
-- Drop the dead letters, or the messages of tasks that failed, that are over a bound, the oldest first.
-- ARGV: letters kept at most, bytes of them, seconds, '1' for those of tasks that failed
-- Returns the ids of those dropped: a hundred at most.
return trim_letters(ARGV[4] == '1' and FAILED_TASKS or DEAD_LETTERS, tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]))
