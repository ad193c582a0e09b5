#!lua flags=allow-oom
-- needs: clock places lists states again payload
-- Put tasks of a dead worker back at the head of their lists, and charge the death to those that ran.
-- A task whose deaths reach the limit stays in flight and is returned: the caller buries it.
-- KEYS: in-flight hash, epoch hash
-- ARGV: the epoch that was begun for this restore (in a later one another worker runs), deaths at which a task is given
--       up, bytes of payload after which to stop, '1' if nothing else is in flight, then seqs, the last claimed first
-- Returns {how many of the seqs were processed, how many were put back, {ids put back}, {list, why, ...} of tasks that
-- stay in flight, then (seq, list, payload, deaths) of each task to give up}. The caller calls again for the rest. If
-- it dies between two calls, the next restore continues: a task leaves the record of what ran when it leaves flight.
local epoch, now_counted = tonumber(ARGV[1]), tonumber(redis.call('HGET', KEYS[2], 'number') or 0)
if now_counted > epoch then
  return redis.error_reply('STALE restore of epoch ' .. epoch .. ', now is ' .. now_counted)
end
local inflight, limit, bytes, last = KEYS[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4] == '1'

-- Let the state of a task that had begun say that it waits again.
local ids = {}
local function wait_again(payload, list, deliveries)
  local id = id_of(payload)
  if not id then return end
  ids[#ids + 1] = id
  if state_of(id) == 'STARTED' then write_waiting(id, list, 0, deliveries + 1, told_before(id)) end
end
local ran = {}
for seq in string.gmatch(redis.call('HGET', inflight, 'running') or '', '%d+') do ran[seq] = true end

local stuck = {}
local answer, done, back, wakes = {0, 0, ids, stuck}, 0, 0, {}
for i = 5, #ARGV do
  if bytes <= 0 then break end
  local seq = ARGV[i]
  local payload, list = unpack(redis.call('HMGET', inflight, seq, seq .. ':list'))
  if not list then
    redis.call('HDEL', inflight, seq)
  elseif payload then
    bytes = bytes - #payload
    local deaths, deliveries
    payload, deaths, deliveries = counted(payload, ran[seq] and 1 or 0)
    if deaths >= limit then
      -- Keep it in flight, with the new count, until the caller has written its end.
      redis.call('HSET', inflight, seq, payload)
      for _, part in ipairs({seq, list, payload, deaths}) do answer[#answer + 1] = part end
    else
      local tier, model, why = put_back(list, payload)
      if why then
        stuck[#stuck + 1], stuck[#stuck + 2] = list, why
        if ran[seq] then redis.call('HSET', inflight, seq, payload) end
      else
        wait_again(payload, list, deliveries)
        redis.call('HDEL', inflight, seq, seq .. ':list')
        back = back + 1
      end
      if tier then
        local key = tier .. '.' .. model
        wakes[key] = wakes[key] or {tier, model, 0}
        wakes[key][3] = wakes[key][3] + 1
      end
    end
  end
  ran[seq] = nil
  done = done + 1
end
local still = {}
for seq in pairs(ran) do still[#still + 1] = seq end
if #still == 0 or last and done == #ARGV - 4 then
  redis.call('HDEL', inflight, 'running')
else
  redis.call('HSET', inflight, 'running', table.concat(still, ' '))
end
for _, one in pairs(wakes) do wake_for(unpack(one)) end
if back > 0 then
  local by = string.match(redis.call('HGET', KEYS[2], 'by') or '', '^reaper') or 'restart'
  redis.pcall('HINCRBY', COUNTS, 'redelivered ' .. by .. ' -', back)
end
answer[1], answer[2] = done, back
return answer
