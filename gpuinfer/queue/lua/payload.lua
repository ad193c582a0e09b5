-- Library: what is read of a payload, and written in front of it, as text: no payload is parsed.
--   {"gpuinfer": [deliveries, deaths], <the rest as the producer wrote it>

-- Return the first string that stands behind a name: '"id":'. In the body, JSON in JSON, the quotes would be
-- escaped. The plain search is ten times as fast as a pattern where a long body comes first.
local function value_of(payload, name)
  local at = 1
  while true do
    local _, last = string.find(payload, name, at, true)
    if not last then return nil end
    local value = string.match(payload, '^ ?"([^"]+)"', last + 1)
    if value then return value end
    at = last + 1
  end
end

-- Return the id of a task: the header of that name, or, where protocol 1 has it in the body, the correlation id.
-- Nil when it cannot be told.
local function id_of(payload)
  local id = value_of(payload, '"id":') or value_of(payload, '"correlation_id":')
  if not id or not string.find(id, '\\', 1, true) then return id end
  local read, value = pcall(cjson.decode, '["' .. id .. '"]')
  return read and value[1] or nil
end

-- Return a payload with one delivery and the given deaths more in front of it; its deaths, and its deliveries. What is
-- no object stays as it is.
local function counted(payload, died)
  local head, deliveries, deaths = string.match(payload, '^({"gpuinfer": %[(%d+), (%d+)%], )')
  deliveries, deaths = (deliveries or 0) + 1, (deaths or 0) + died
  if string.sub(payload, 1, 1) ~= '{' then return payload, deaths, deliveries end
  local rest = string.sub(payload, head and #head + 1 or 2)
  return string.format('{"gpuinfer": [%d, %d], ', deliveries, deaths) .. rest, deaths, deliveries
end
