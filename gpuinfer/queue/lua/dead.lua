-- Library: the stored messages of tasks that ended badly, so that they can be retried: the dead letters, and failed
-- tasks. Each of the two kinds has the letters, the time at which each was added, and their total bytes, including the
-- large bodies kept for them. A dead letter is JSON (Store.bury); the letter of a failed task is its list, a line feed,
-- and its message.
local DEAD_LETTERS = {letters = DEAD, ages = DEAD_AGES, bytes = DEAD_BYTES}
local FAILED_TASKS = {letters = FAILED, ages = FAILED_AGES, bytes = FAILED_BYTES}

local function letters_size(kept) return tonumber(redis.call('GET', kept.bytes) or 0) end

-- Drop a letter, and its body unless that is still needed. Returns 1, or 0 if there was none.
local function drop_letter(kept, id, needs_body)
  local size = redis.call('HSTRLEN', kept.letters, id) + redis.call('STRLEN', BODY_PREFIX .. id)
  redis.call('ZREM', kept.ages, id)
  if redis.call('HDEL', kept.letters, id) == 0 then return 0 end
  if not needs_body then redis.call('UNLINK', BODY_PREFIX .. id) end
  redis.call('SET', kept.bytes, string.format('%.0f', math.max(0, letters_size(kept) - size)))
  return 1
end

-- Return the caller of a letter's task, from its list; '' for none. A dead letter begins with its id and its list.
local function owner_of_letter(id)
  local list = string.match(redis.call('HGET', DEAD, id) or '', '^{"id":"[^"]*","list":"([^"]*)"')
    or string.match(redis.call('HGET', FAILED, id) or '', '^([^\n]*)\n')
  return string.match(list or '', '@([^@\\\6]+)') or ''
end

local function add_letter(kept, id, letter)
  drop_letter(kept, id, true)
  redis.call('HSET', kept.letters, id, letter)
  local time = redis.call('TIME')
  redis.call('ZADD', kept.ages, string.format('%d.%06d', time[1], time[2]), id)
  local size = letters_size(kept) + #letter + redis.call('STRLEN', BODY_PREFIX .. id)
  redis.call('SET', kept.bytes, string.format('%.0f', size))
end

-- Drop up to a hundred of the oldest letters: while there are more than `most`, while they have more than `bytes` (a
-- single one may have more), and while they are older than `age` seconds. Returns their ids.
local function trim_letters(kept, most, bytes, age)
  local cutoff, dropped = redis.call('TIME')[1] - age, {}
  while #dropped < 100 do
    local oldest = redis.call('ZRANGE', kept.ages, 0, 0, 'WITHSCORES')
    if not oldest[1] then break end
    local count = redis.call('HLEN', kept.letters)
    local over = count > most or (count > 1 and letters_size(kept) > bytes) or tonumber(oldest[2]) < cutoff
    if not over then break end
    if drop_letter(kept, oldest[1]) == 1 then dropped[#dropped + 1] = oldest[1] end
  end
  return dropped
end
