#!lua flags=allow-oom
-- Say what models take, also when Redis is full: who submits a request checks it by that.
-- ARGV: a model and its signature (JSON), and so on
-- What is said of models that are in the catalogue no more is dropped.
for i = 1, #ARGV, 2 do redis.call('HSET', SIGNATURES, ARGV[i], ARGV[i + 1]) end
for _, model in ipairs(redis.call('HKEYS', SIGNATURES)) do
  if not redis.call('ZSCORE', CATALOGUE, model) then redis.call('HDEL', SIGNATURES, model) end
end
