-- Library: the lists that were passed over for so long that one of them goes first in the next claim.
--
-- The lists of a group are checked only now and then; claims in between use the result of the last check. A list was
-- not passed over if any worker has claimed from it since the last check.
local LOOKS, LONGEST_LOOK_MS = 10, 1000

-- Check the lists of a group; return those that were passed over for `ageing` milliseconds, the longest first, packed;
-- '' if there are none. The hash `since` has, for each list, since when, and the count of claimed tasks at that time.
local function look_for_aged(group, lists, ageing)
  local since, before = AGEING_PREFIX .. group, {}
  local flat = redis.call('HGETALL', since)
  for i = 1, #flat, 2 do before[flat[i]] = flat[i + 1] end
  before[''] = nil
  local time, new, aged = math.floor(now() * 1000), {}, {}
  for first = 1, #lists, 1000 do
    local last = math.min(first + 999, #lists)
    local counters = {}
    for i = first, last do
      local _, index = place_of(lists[i])
      counters[i] = counter_of(lists[i], index)
    end
    local claimed = redis.call('HMGET', CLAIMED, unpack(counters, first, last))
    for i = first, last do
      local list, count = lists[i], claimed[i - first + 1] or '0'
      local at, counted = string.match(before[list] or '', '^(%d+) (.*)$')
      before[list] = nil
      if counted ~= count then
        redis.call('HSET', since, list, string.format('%d %s', time, count))
      elseif tonumber(at) <= time - ageing then
        aged[#aged + 1] = {list, tonumber(at)}
      end
    end
  end
  for list in pairs(before) do redis.call('HDEL', since, list) end
  table.sort(aged, function(a, b) return a[2] < b[2] end)
  for i, one in ipairs(aged) do aged[i] = one[1] end
  local packed = #aged > 0 and cmsgpack.pack(aged) or ''
  local rest = math.floor(math.min(LONGEST_LOOK_MS, ageing / LOOKS))
  if rest > 0 then redis.call('SET', AGED_PREFIX .. group, packed, 'PX', rest) end
  return packed
end
