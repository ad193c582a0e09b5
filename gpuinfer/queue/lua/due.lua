#!lua flags=allow-oom
-- needs: clock places lists later
-- Append tasks whose ETA has come to their lists, and wake workers that serve them.
-- ARGV: maximum number of tasks, maximum bytes of payload
-- Returns {number of tasks moved, milliseconds until the next one is due or -1}.
local moved = move_due(tonumber(ARGV[1]), tonumber(ARGV[2]))
local due = redis.call('GET', DUE)
return {moved, due and math.max(0, math.ceil((tonumber(due) - now()) * 1000)) or -1}
