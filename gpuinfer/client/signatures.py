# SPDX-License-Identifier: Apache-2.0
"""What models take, as a client remembers it for a while. No input, no output: the drivers ask Redis.

A request is refused by what Redis says now, never by what was remembered: see ``Signatures.doubts``. Where
hosts have different versions of a model, it is refused when none of them takes it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import orjson

from gpuinfer.client.inputs import opened
from gpuinfer.client.validation import Validator
from gpuinfer.errors import InputError, ManifestError
from gpuinfer.models.signature import Signature
from gpuinfer.queue.submission import Json

#: What is remembered is asked for again after this long, in seconds.
FRESH_S = 30.0
#: A refusal by what is older is not believed before Redis was asked again.
SURE_S = 0.5
#: Models that are remembered at most.
_MOST = 1000


class _Known(NamedTuple):
    #: One for each version of the model that some host has, the most frequent first.
    texts: tuple[str, ...]
    validators: tuple[Validator, ...]
    at: float


class Signatures:
    """The signatures of models by name."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, _Known] = {}

    def stale(self, model: str) -> bool:
        """Whether to ask Redis for the model's signature."""
        known = self._known.get(model)
        return known is None or self._clock() - known.at > FRESH_S

    def doubts(self, model: str) -> bool:
        """Whether a refusal may be due to an old signature."""
        known = self._known.get(model)
        return known is None or self._clock() - known.at > SURE_S

    def found(self, model: str, text: bytes | None) -> None:
        """Remember what Redis answered. What is no signature is none."""
        texts = versions(text)
        known = self._known.get(model)
        if known is not None and known.texts == texts:
            self._known[model] = known._replace(at=self._clock())
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[model] = _Known(texts, _validators(texts), self._clock())

    def of(self, model: str) -> Signature | None:
        """Return a model's signature, where it is known: of several, the one that most have."""
        known = self._known.get(model)
        try:
            return Signature.from_json(orjson.loads(known.texts[0])) if known and known.texts else None
        except (ValueError, ManifestError):
            return None

    def all_ready(self, model: str | None, values: Sequence[Any], *, many: bool) -> list[Any]:
        """Return the inputs of several tasks as ``ready`` does; an error says which one is meant."""
        found = []
        for place, value in enumerate(values):
            try:
                found.append(self.ready(model, value, many=many))
            except InputError as exc:
                if len(values) > 1:
                    exc.message = f"input {place + 1} of {len(values)} {exc.message}"
                raise
        return found

    def ready(self, model: str | None, inputs: Any, *, many: bool) -> Any:
        """Return inputs as they are sent: files are read, and what the model cannot take is refused.

        ``Json`` stays what it is where the model takes its value as it is. Raises InputError.
        """
        known = self._known.get(model) if model is not None else None
        if known is None or not known.validators:
            return inputs if type(inputs) is Json else opened(inputs, many=many)
        first: InputError | None = None
        for validator in known.validators:
            try:
                return _ready(validator, inputs, many=many)
            except InputError as exc:
                first = first or exc
        assert first is not None  # noqa: S101  there was a validator
        raise first


def _ready(validator: Validator, inputs: Any, *, many: bool) -> Any:
    if type(inputs) is Json:
        value = inputs.value if many else validator.settled(inputs.value)
        validator.check(value, many=many)
        return inputs if value is inputs.value else value
    inputs = opened(inputs, many=many, kinds=validator.kinds)
    inputs = inputs if many else validator.settled(inputs)
    validator.check(inputs, many=many)
    return inputs


def versions(said: bytes | None) -> tuple[str, ...]:
    """Return the signatures in what the script ``describe`` keeps of a model, the most frequent first.

    Of what is none of its, nothing.
    """
    if not said:
        return ()
    try:
        body = orjson.loads(said)
        counts = Counter(digest for _, digest in body["said"].values())
        order = sorted(counts, key=lambda digest: (-counts[digest], digest))
        return tuple(str(body["texts"][digest]) for digest in order)
    except (ValueError, TypeError, KeyError, AttributeError):
        return ()


def _validators(texts: Sequence[str]) -> tuple[Validator, ...]:
    """Return what validates by each; nothing where one cannot be read: what its version takes is unknown."""
    try:
        return tuple(Validator(Signature.from_json(orjson.loads(text))) for text in texts)
    except (ManifestError, ValueError, TypeError, AttributeError):
        return ()
