#!lua flags=allow-oom
-- needs: states ends
-- Write the final state of a task that waits or runs; one that has ended is left alone. Its worker finds out: it
-- begins no other part of it, and what comes of the part that runs is dropped.
-- KEYS: result key
-- ARGV: task id, meta, result ttl in seconds, reply channel of its client, meta of a task that nothing is known of
--       ('': none is written): a plain producer's, whose id stands in its message alone, prefix of the process that
--       would have made the id; then, where that matters, whose task it must be
-- Returns 1 when the state was written; -1 where it is another's task, or one of which nothing is known.
local state, foreign = state_of(ARGV[1])
local owner = owner_of(ARGV[1])
if ARGV[7] and owner ~= ARGV[7] then return -1 end
if foreign or FINAL[state or ''] then return 0 end
-- Another program's text, which is no state.
if not state and redis.call('GETRANGE', KEYS[1], 0, 0) ~= '' then return 0 end
-- Without a TTL while a message waits: it may for long, in a paused queue or for its ETA.
local meta, label, ttl = ARGV[2], 'cancelled', nil
if not state then meta, label, ttl = ARGV[5], 'cancelled_unknown', ARGV[3] end
if meta == '' then return 0 end
-- A task of a client process that is known has its state from its submission on: this one's is gone.
if not state and redis.call('ZSCORE', ORIGINS, ARGV[6]) then return 0 end
-- It stays its owner's.
if owner ~= '' then meta = string.gsub(meta, '^{"status":"REVOKED",', '%0"caller":"' .. owner .. '",') end
-- The flag above lets a full Redis take anything; an id that anybody may have made up is refused there.
if not state then
  local memory = redis.call('INFO', 'memory')
  local function value(name) return tonumber(string.match(memory, '\n' .. name .. ':(%d+)') or 0) end
  local most = value('maxmemory')
  if most > 0 and value('used_memory') - value('mem_not_counted_for_evict') > most then
    return redis.error_reply("OOM command not allowed when used memory > 'maxmemory'.")
  end
end
local written, err = finish({ARGV[1], meta, '1', ARGV[4], label}, 1, 5, ttl)
return written or err
