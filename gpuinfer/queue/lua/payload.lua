-- Library: search in a payload, and write in front of it, as text: no payload is parsed.
--   {"gpuinfer": [deliveries, deaths], <the rest as the producer wrote it>

-- Return the first string value of a name, such as '"id":'. It cannot match within the body, which is JSON in a JSON
-- string, where quotes are escaped. If a long body comes first, plain search is ten times as fast as a pattern.
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

-- Return the id of a task: the header `id`, or the correlation id, as protocol 1 has the id in the body. Nil if neither
-- is found.
local function id_of(payload)
  local id = value_of(payload, '"id":') or value_of(payload, '"correlation_id":')
  if not id or not string.find(id, '\\', 1, true) then return id end
  local read, value = pcall(cjson.decode, '["' .. id .. '"]')
  return read and value[1] or nil
end

-- Return a payload with its counts increased, by one delivery and `died` deaths; then its deaths and its deliveries. A
-- payload that is not an object is returned unchanged.
local function counted(payload, died)
  local head, deliveries, deaths = string.match(payload, '^({"gpuinfer": %[(%d+), (%d+)%], )')
  deliveries, deaths = (deliveries or 0) + 1, (deaths or 0) + died
  if string.sub(payload, 1, 1) ~= '{' then return payload, deaths, deliveries end
  local rest = string.sub(payload, head and #head + 1 or 2)
  return string.format('{"gpuinfer": [%d, %d], ', deliveries, deaths) .. rest, deaths, deliveries
end
