# SPDX-License-Identifier: Apache-2.0
"""Base of the synchronous and the asyncio client."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

from gpuinfer.client import core
from gpuinfer.client.core import Origin
from gpuinfer.client.signatures import Signatures
from gpuinfer.errors import InputError
from gpuinfer.names import MODEL_NAME
from gpuinfer.queue.connection import user_of
from gpuinfer.queue.options import Options
from gpuinfer.queue.submission import Submission
from gpuinfer.settings import Settings, load


def settings_for(source: Settings | str | None) -> Settings:
    """Return the given settings, or this host's, with the broker URL replaced by one given.

    Only the sections that a client needs are read, so errors in others do not matter.
    """
    if isinstance(source, Settings):
        return source
    loaded = load(only=("broker", "queue")).settings
    if source is None:
        return loaded
    broker = type(loaded.broker).model_validate(loaded.broker.model_dump() | {"url": source})
    return loaded.model_copy(update={"broker": broker})


class DefaultModel:
    """The fleet's default model, cached for a while.

    Messages carry the model's name, so a change of the default does not redirect messages already built.
    """

    FRESH_S = 5.0
    #: "No default yet" is cached briefly, too, to avoid a second round trip per task.
    NONE_S = 0.1

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stale_at = -math.inf
        self.name: str | None = None
        #: Whether ``name`` is a valid model name, to look up in the catalogue.
        self.named = False

    @property
    def stale(self) -> bool:
        """Whether to ask Redis again."""
        return self._clock() > self._stale_at

    def found(self, value: bytes | None) -> None:
        """Store Redis's answer; None: there is no default model."""
        self.name = value.decode() if value else None
        self.named = self.name is not None and MODEL_NAME.fullmatch(self.name) is not None
        self._stale_at = self._clock() + (self.FRESH_S if value else self.NONE_S)


class Driver:
    """A client's settings, and its caches of the default model and signatures."""

    def __init__(self, source: Settings | str | None = None) -> None:
        """``source``: a broker URL, a Settings object, or None for this host's settings."""
        self._settings = settings_for(source)
        self._user = user_of(self._settings.broker)
        self._default = DefaultModel()
        self._signatures = Signatures()

    @property
    def default_model(self) -> str | None:
        """The model for requests that name none, as last read; None: not known."""
        return self._default.name

    def _model_of(self, options: Options) -> str | None:
        """Return the model that a request is for; None: not known, or not a valid name."""
        model = options.get("model")
        if not model:
            return self._default.name if self._default.named else None
        return model if isinstance(model, str) and MODEL_NAME.fullmatch(model) else None

    def _build_many(self, inputs: Iterable[object], options: Options, origin: Origin) -> list[Submission]:
        """Return a task for each input. Raises InputError."""
        default = self._default.name
        return [
            core.build(value, many=False, origin=origin, default_model=default, **options) for value in inputs
        ]


def refuse_key(options: Options) -> None:
    """Refuse an idempotency key for several tasks. Raises InputError."""
    if options.pop("idempotency_key", None) is not None:
        raise InputError("identifies one task; use submit or submit_batch", "idempotency_key")
