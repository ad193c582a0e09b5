#!lua flags=allow-oom
-- Store the signatures of models, by which clients check inputs. Runs in a full Redis, too.
-- ARGV: the reporter (a worker, or a host's watcher), then (model, signature as JSON) pairs Hosts may have different
--       versions of a model, so each distinct signature is stored once, and for each reporter its digest and the time
--       (by Redis's clock). Reports that were not repeated for long are dropped, and so are models that are no longer
--       in the catalogue.
local now = tonumber(redis.call('TIME')[1])
for i = 2, #ARGV, 2 do
  local model, text = ARGV[i], ARGV[i + 1]
  local digest = redis.sha1hex(text)
  local read, before = pcall(cjson.decode, redis.call('HGET', SIGNATURES, model) or '')
  local said, texts = {[ARGV[1]] = {now, digest}}, {[digest] = text}
  if read and type(before) == 'table' and before.said and before.texts then
    for who, what in pairs(before.said) do
      if who ~= ARGV[1] and what[1] > now - SIGNATURE_VOID then
        said[who], texts[what[2]] = what, before.texts[what[2]]
      end
    end
  end
  redis.call('HSET', SIGNATURES, model, cjson.encode({said = said, texts = texts}))
end
for _, model in ipairs(redis.call('HKEYS', SIGNATURES)) do
  if not redis.call('ZSCORE', CATALOGUE, model) then redis.call('HDEL', SIGNATURES, model) end
end
