#!lua
-- Append tasks to their lists, remember their ids, and ring. Without allow-oom: a full Redis refuses
-- the whole call before anything is written.
-- KEYS: bell, list
-- ARGV: idempotency ttl in seconds, result key prefix, pending meta, idempotency key or '', then (id, payload) pairs
-- Returns the id that holds: the given one, or the one an idempotency key already stands for.
if ARGV[4] ~= '' then
  local holder = redis.call('GET', ARGV[4])
  -- A holder whose result has expired holds no more.
  if holder and holder ~= ARGV[5] and redis.call('EXISTS', ARGV[2] .. holder) == 1 then return holder end
  redis.call('SET', ARGV[4], ARGV[5], 'EX', ARGV[1])
end
for i = 5, #ARGV, 2 do
  -- NX: a call repeated because its answer was lost appends nothing twice.
  -- Without a TTL: what waits is never evicted, and so never forgotten.
  if redis.call('SET', ARGV[2] .. ARGV[i], ARGV[3], 'NX') then
    redis.call('LPUSH', KEYS[2], ARGV[i + 1])
  end
end
redis.call('LPUSH', KEYS[1], 1)
redis.call('LTRIM', KEYS[1], 0, 63)
return ARGV[5]
