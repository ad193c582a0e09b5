-- Library: parse the names of lists.
local SEP = '\6\22'
local BASE = {realtime = 0, default = 10, batch = 20}
local LAST_RANK = {realtime = '9', default = '19', batch = '29'}
local TIERS = {[0] = 'realtime', 'default', 'batch'}

-- Return a list's tier, model ('' for the default one) and rank; nil if it is not the name of a list of ours.
local function place_of(list)
  local tier, model, caller, priority = string.match(list, '^(%a+)([^@\6]*)([^\6]*)(.*)$')
  local base = BASE[tier or '']
  if not base or model ~= '' and not string.find(model, '^%.[a-z0-9][a-z0-9_.-]*$') then return end
  if caller ~= '' and not string.find(caller, '^@[^@\22]+$') then return end
  if priority ~= '' then priority = string.match(priority, '^\6\22(%d)$') end
  if priority then return tier, string.sub(model, 2), base + 9 - (tonumber(priority) or 0) end
end
