# SPDX-License-Identifier: Apache-2.0
"""What models take, as a client remembers it for a while. No input, no output: the drivers ask Redis.

A request is refused by what Redis says now, never by what was remembered: see ``Signatures.doubts``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import orjson

from gpuinfer.client.inputs import opened
from gpuinfer.client.validation import Validator
from gpuinfer.errors import InputError, ManifestError
from gpuinfer.models.signature import Signature
from gpuinfer.queue.message import Json

#: What is remembered is asked for again after this long, in seconds.
FRESH_S = 30.0
#: A refusal by what is older is not believed before Redis was asked again.
SURE_S = 0.5
#: Models that are remembered at most.
_MOST = 1000


class _Known(NamedTuple):
    text: bytes | None
    validator: Validator | None
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
        known = self._known.get(model)
        if known is not None and known.text == text:
            self._known[model] = known._replace(at=self._clock())
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[model] = _Known(text, _validator(text), self._clock())

    def of(self, model: str) -> Signature | None:
        """Return a model's signature, where it is known."""
        known = self._known.get(model)
        try:
            return Signature.from_json(orjson.loads(known.text)) if known and known.text else None
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
        validator = None if known is None else known.validator
        if type(inputs) is Json:
            if validator is None:
                return inputs
            value = inputs.value if many else validator.settled(inputs.value)
            validator.check(value, many=many)
            return inputs if value is inputs.value else value
        if validator is None:
            return opened(inputs, many=many)
        inputs = opened(inputs, many=many, kinds=validator.kinds)
        inputs = inputs if many else validator.settled(inputs)
        validator.check(inputs, many=many)
        return inputs


def _validator(text: bytes | None) -> Validator | None:
    if not text:
        return None
    try:
        return Validator(Signature.from_json(orjson.loads(text)))
    except (ManifestError, ValueError, TypeError, AttributeError):
        return None
