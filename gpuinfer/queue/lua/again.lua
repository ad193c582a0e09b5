-- Library: the state of a task that waits, but was not just submitted: it was put back, retried, or follows another
-- task.
-- Needs places, lists and states.

-- Return the end of a waiting task's state, that is, all after its place, with the values of its last state.
local function told_before(id)
  local read, body = pcall(cjson.decode, text_of(id))
  body = read and type(body) == 'table' and body or {}
  local about, told = type(body.about) == 'table' and body.about or {}, ''
  for _, name in ipairs({'expires', 'metadata', 'traceparent'}) do
    local value = about[name]
    if value ~= nil then
      -- cjson writes 14 digits.
      value = type(value) == 'number' and string.format('%.17g', value) or cjson.encode(value)
      told = told .. ',"' .. name .. '":' .. value
    end
  end
  told = told .. '}'
  if type(body.sent_at) == 'number' then told = told .. ',"sent_at":' .. string.format('%.3f', body.sent_at) end
  return told .. '}'
end

-- Write the state of a task that waits in a list, behind `ahead` others. `attempt`: the number of its next attempt, if
-- not 1; `told`: the end of its state.
local function write_waiting(id, list, ahead, attempt, told, ...)
  local tier, index = place_of(list)
  if not tier then return write_passing(id, PENDING_META, ...) end
  local caller = string.match(list, '^[^@\6]*@([^\6]*)')
  local priority = string.match(list, '\6\22([1-9])$')
  local is_default = index == ''
  local claimed = redis.call('HGET', CLAIMED, counter_of(list, index)) or '0'
  return write_passing(
    id,
    PENDING_HEAD .. 'null,"about":{'
      .. (caller and '"caller":' .. cjson.encode(caller) .. ',' or '')
      .. '"queue":"' .. tier .. '","model":' .. cjson.encode(is_default and default_model() or index)
      .. ',"place":[' .. (is_default and 1 or 0) .. ',' .. claimed .. ',' .. ahead .. ',1]'
      .. (priority and ',"priority":' .. priority or '')
      .. (attempt and attempt > 1 and ',"attempt":' .. attempt or '')
      .. told,
    ...
  )
end
