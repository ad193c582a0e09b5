#!lua flags=allow-oom
-- needs: dead
-- Drop the dead letters, or the kept messages of failed tasks, that exceed a limit, the oldest first.
-- ARGV: maximum letters, bytes and age in seconds, '1' for those of failed tasks
-- Returns the ids of those dropped: at most a hundred.
return trim_letters(ARGV[4] == '1' and FAILED_TASKS or DEAD_LETTERS, tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]))
