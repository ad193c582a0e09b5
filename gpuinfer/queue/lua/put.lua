#!lua
-- needs: clock places lists
-- Append a Celery producer's message to its list, and wake an idle worker.
-- KEYS: list
-- ARGV: message
redis.call('LPUSH', KEYS[1], ARGV[1])
local tier, model = index_list(KEYS[1])
if tier then wake_for(tier, model, 1) end
return 1
