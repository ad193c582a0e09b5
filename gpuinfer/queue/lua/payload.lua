-- Library: what is read of a payload, and written in front of it, as text: no payload is parsed.
--   {"gpuinfer": [deliveries, deaths], <the rest as the producer wrote it>

-- Return the id of a task: the header of that name; in the body, JSON in JSON, its quotes would be escaped. The
-- plain search is ten times as fast as a pattern where a long body comes first.
local function id_of(payload)
  local at = 1
  while true do
    local _, last = string.find(payload, '"id":', at, true)
    if not last then return nil end
    local id = string.match(payload, '^ ?"([^"]+)"', last + 1)
    if id then return id end
    at = last + 1
  end
end

-- Return a payload with so many more deaths, and one delivery more, in front of it; and its deaths. What is no
-- object stays as it is.
local function counted(payload, died)
  local head, deliveries, deaths = string.match(payload, '^({"gpuinfer": %[(%d+), (%d+)%], )')
  deliveries, deaths = (deliveries or 0) + 1, (deaths or 0) + died
  if string.sub(payload, 1, 1) ~= '{' then return payload, deaths end
  local rest = string.sub(payload, head and #head + 1 or 2)
  return string.format('{"gpuinfer": [%d, %d], ', deliveries, deaths) .. rest, deaths
end
