-- Library: the dead letters, since when each is there, and how many bytes they have together, with the large
-- bodies that are kept for them.

local function letters_size() return tonumber(redis.call('GET', DEAD_BYTES) or 0) end

-- Drop a letter, and its body unless that is kept. Returns 1, or 0 when there was none.
local function drop_letter(id, kept)
  local size = redis.call('HSTRLEN', DEAD, id) + redis.call('STRLEN', BODY_PREFIX .. id)
  redis.call('ZREM', DEAD_AGES, id)
  if redis.call('HDEL', DEAD, id) == 0 then return 0 end
  if not kept then redis.call('UNLINK', BODY_PREFIX .. id) end
  redis.call('SET', DEAD_BYTES, string.format('%.0f', math.max(0, letters_size() - size)))
  return 1
end

-- Return whose task a letter is, by the list that it came from: it begins with its id, and that list.
local function owner_of_letter(id)
  local letter = redis.call('HGET', DEAD, id) or ''
  local list = string.match(letter, '^{"id":"[^"]*","list":"([^"]*)"')
  return string.match(list or '', '@([^@\\]+)') or ''
end

local function add_letter(id, letter)
  drop_letter(id, true)
  redis.call('HSET', DEAD, id, letter)
  local time = redis.call('TIME')
  redis.call('ZADD', DEAD_AGES, string.format('%d.%06d', time[1], time[2]), id)
  redis.call('SET', DEAD_BYTES, string.format('%.0f', letters_size() + #letter + redis.call('STRLEN', BODY_PREFIX .. id)))
end

-- Drop the oldest letters, a hundred at most, while there are more than `most`, or those have more than `bytes`
-- (one may have), and those that are older than `age` seconds. Returns their ids.
local function trim_letters(most, bytes, age)
  local cutoff, dropped = redis.call('TIME')[1] - age, {}
  while #dropped < 100 do
    local oldest = redis.call('ZRANGE', DEAD_AGES, 0, 0, 'WITHSCORES')
    if not oldest[1] then break end
    local count = redis.call('HLEN', DEAD)
    local over = count > most or (count > 1 and letters_size() > bytes) or tonumber(oldest[2]) < cutoff
    if not over then break end
    if drop_letter(oldest[1]) == 1 then dropped[#dropped + 1] = oldest[1] end
  end
  return dropped
end
