-- Library: what follows the end of a task: messages to send, and ends of tasks that will never begin.
-- A script gets it after the ends, for each task that has any:
--   number of the end (from 1), task id, label for tasks that end without a run, number of parts, then for each part:
--   '1': it follows a success, '0': a failure; list ('': nothing is sent), message, '1' for a task of ours, its id, its
--   model ('': the default one), the end of its state (write_waiting), number of ends, and the ends: (id, meta). The
--   ends are written if nothing is sent, or if Redis refuses the message.

-- Return it as tables; it begins at index `at`.
local function read_following(flat, at)
  local all = {}
  while at <= #flat do
    local one = {which = tonumber(flat[at]), id = flat[at + 1], label = flat[at + 2]}
    local count = tonumber(flat[at + 3])
    at = at + 4
    for k = 1, count do
      local part = {
        success = flat[at] == '1',
        list = flat[at + 1],
        message = flat[at + 2],
        ours = flat[at + 3] == '1',
        id = flat[at + 4],
        model = flat[at + 5],
        told = flat[at + 6],
      }
      local ends = 2 * flat[at + 7]
      for e = 1, ends do part[e] = flat[at + 7 + e] end
      at = at + 8 + ends
      one[k] = part
    end
    all[#all + 1] = one
  end
  return all
end

-- Return what follows a task that leaves flight with this meta ('': it did not run): true for what follows a success,
-- false for what follows a failure, nil for nothing. If the task was cancelled before, that counts as a failure. If it
-- has another final state already, its successors were sent together with that.
local function outcome_of(id, meta)
  local found = state_of(id)
  if found == 'REVOKED' then return false end
  if FINAL[found or ''] then return nil end
  local own = string.match(meta, '^{"status": ?"(%u+)"')
  if own then return own == 'SUCCESS' end
end

-- Send a message; return the error if it cannot be sent.
local function send(part, wakes)
  local list, model = part.list, part.model
  if part.ours and model ~= '' and (redis.call('ZSCORE', CATALOGUE, model) or redis.call('ZCARD', CATALOGUE) == 0) then
    list = list_of(list, model)
  end
  local answer = may('LPUSH', list, '') or redis.pcall('LPUSH', list, part.message)
  if type(answer) == 'table' then return answer.err end
  if part.ours then
    write_waiting(part.id, list, answer - 1, 1, part.told, 'NX')
    local tier, indexed = index_list(list)
    local key = tier .. '.' .. indexed
    wakes[key] = wakes[key] or {tier, indexed, 0}
    wakes[key][3] = wakes[key][3] + 1
  end
end

-- Send or end what follows each task, by its `success`. Returns {id, why, ...} of the messages that were refused.
local function follow(all, ttl)
  local ends, unsent, wakes, met = {}, {}, {}, {}
  for _, one in ipairs(all) do
    for _, part in ipairs(met[one.id] and {} or one) do
      if part.success == one.success then
        local why = part.list ~= '' and send(part, wakes)
        if why then unsent[#unsent + 1], unsent[#unsent + 2] = part.id, why end
        for e = 1, (why or part.list == '') and #part or 0, 2 do
          local n = #ends
          ends[n + 1], ends[n + 2], ends[n + 3], ends[n + 4], ends[n + 5] = part[e], part[e + 1], '1', '', one.label
        end
      end
    end
    met[one.id] = true
  end
  if #ends > 0 then finish(ends, 1, 5, ttl) end
  for _, group in pairs(wakes) do wake_for(unpack(group)) end
  return unsent
end
