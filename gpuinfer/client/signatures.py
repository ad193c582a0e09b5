# SPDX-License-Identifier: Apache-2.0
"""A cache of model signatures. It does no I/O: the drivers ask Redis.

An old entry never refuses a request: the driver asks Redis first, see ``Signatures.doubts``. If hosts have
different versions of a model, a request is refused only if none of them accepts it.
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

#: An entry is read again after this many seconds.
FRESH_S = 30.0
#: Before an entry older than this refuses a request, Redis is asked again.
SURE_S = 0.5
#: Maximum number of cached models.
_MOST = 1000


class _Known(NamedTuple):
    #: One validator per version of the model in the fleet, the most frequent first.
    texts: tuple[str, ...]
    validators: tuple[Validator, ...]
    at: float


class Signatures:
    """Cached signatures by model name."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, _Known] = {}

    def stale(self, model: str) -> bool:
        """Whether to ask Redis for this model's signature."""
        known = self._known.get(model)
        return known is None or self._clock() - known.at > FRESH_S

    def doubts(self, model: str) -> bool:
        """Whether a refusal may be due to an outdated signature."""
        known = self._known.get(model)
        return known is None or self._clock() - known.at > SURE_S

    def found(self, model: str, text: bytes | None) -> None:
        """Store Redis's answer. An unreadable signature counts as unknown."""
        texts = versions(text)
        known = self._known.get(model)
        if known is not None and known.texts == texts:
            self._known[model] = known._replace(at=self._clock())
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[model] = _Known(texts, _validators(texts), self._clock())

    def of(self, model: str) -> Signature | None:
        """Return a model's signature, or None if unknown; of several versions, the most frequent one."""
        known = self._known.get(model)
        try:
            return Signature.from_json(orjson.loads(known.texts[0])) if known and known.texts else None
        except (ValueError, ManifestError):
            return None

    def all_ready(self, model: str | None, values: Sequence[Any], *, many: bool) -> list[Any]:
        """Call ``ready`` for the inputs of several tasks; an error names the input."""
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
        """Return inputs ready to send: files are read, and the signature is checked.

        ``Json`` is returned unchanged if the model takes its value unchanged. Raises InputError.
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
        assert first is not None  # noqa: S101  there was at least one validator
        raise first


def _ready(validator: Validator, inputs: Any, *, many: bool) -> Any:
    if type(inputs) is Json:
        value = inputs.value if many else validator.unwrapped(inputs.value)
        validator.check(value, many=many)
        return inputs if value is inputs.value else value
    inputs = opened(inputs, many=many, kinds=validator.kinds)
    inputs = inputs if many else validator.unwrapped(inputs)
    validator.check(inputs, many=many)
    return inputs


def versions(said: bytes | None) -> tuple[str, ...]:
    """Return the signatures that the ``describe`` script stores for a model, the most frequent first.

    Unreadable text gives none.
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
    """Return one validator per signature; none if any is unreadable, as its version might accept anything."""
    try:
        return tuple(Validator(Signature.from_json(orjson.loads(text))) for text in texts)
    except (ManifestError, ValueError, TypeError, AttributeError):
        return ()
