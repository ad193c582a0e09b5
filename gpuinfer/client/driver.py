# SPDX-License-Identifier: Apache-2.0
"""Base of the synchronous and the asyncio client."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from redis.exceptions import ResponseError

from gpuinfer.client import submissions
from gpuinfer.client.origin import Origin
from gpuinfer.client.signatures import Signatures
from gpuinfer.client.steps import Script, Steps
from gpuinfer.errors import InputError
from gpuinfer.names import MODEL_NAME
from gpuinfer.queue import keys
from gpuinfer.queue.connection import typed_errors, user_of
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


class Unknown(Exception):
    """Raised where the default model, or what a model takes, must be asked for."""


class Driver:
    """A client's settings, and its caches of the default model and signatures."""

    def __init__(self, source: Settings | str | None = None) -> None:
        """``source``: a broker URL, a Settings object, or None for this host's settings."""
        self._settings = settings_for(source)
        self._user = user_of(self._settings.broker)
        self._errors = typed_errors(self._user)
        self._default = DefaultModel()
        self._signatures = Signatures()

    @property
    def default_model(self) -> str | None:
        """The model for requests that name none, as last read; None: not known."""
        return self._default.name

    def _asks_default(self, options: Options) -> bool:
        """Tell whether Redis must be asked for the fleet's default model."""
        return options.get("model") is None and self._default.stale

    def _model_of(self, options: Options) -> str | None:
        """Return the model that a request is for; None: not known, or not a valid name."""
        model = options.get("model")
        if not model:
            return self._default.name if self._default.named else None
        return model if isinstance(model, str) and MODEL_NAME.fullmatch(model) else None

    def _ready_now(self, inputs: Any, *, many: bool, options: Options) -> Any:
        """Return one task's inputs as they are sent, from the caches alone: the usual case.

        Raises Unknown; InputError, which Redis must confirm: see ``_ready``.
        """
        model = self._model_of(options)
        if self._asks_default(options) or (model is not None and self._signatures.stale(model)):
            raise Unknown
        return self._signatures.ready(model, inputs, many=many)

    def _ready(self, values: list[Any], *, many: bool, options: Options) -> Steps[list[Any]]:
        """Return inputs as they are sent. Raises InputError for a file that cannot be read, and for what the
        model cannot take.
        """
        if self._asks_default(options):
            self._default.found((yield "GET", keys.DEFAULT_MODEL))
        model = self._model_of(options)
        if model is not None and self._signatures.stale(model):
            yield from self._ask_signature(model)
        try:
            return self._signatures.all_ready(model, values, many=many)
        except InputError:
            if model is None or not self._signatures.doubts(model):
                raise
        yield from self._ask_signature(model)
        return self._signatures.all_ready(model, values, many=many)

    def _ask_signature(self, model: str) -> Steps[None]:
        """Fetch a model's signature; a Redis user without the right to read it goes without."""
        try:
            found = yield "HGET", keys.SIGNATURES, model
        except ResponseError:
            found = None
        self._signatures.found(model, found)

    def _build_many(self, inputs: Iterable[object], options: Options, origin: Origin) -> list[Submission]:
        """Return a task for each input. Raises InputError."""
        default = self._default.name
        return [
            submissions.build(value, many=False, origin=origin, default_model=default, **options)
            for value in inputs
        ]


def introduce(origin: Origin) -> Steps[None]:
    """Let Redis know whose ids these are, so that a later request learns that a task has expired."""
    try:
        yield Script("origin", (), [origin.prefix])
    except ResponseError:
        pass  # without the right to, nobody learns that
    except BaseException:
        origin.tell_again()
        raise


def refuse_key(options: Options) -> None:
    """Refuse an idempotency key for several tasks. Raises InputError."""
    if options.pop("idempotency_key", None) is not None:
        raise InputError("identifies one task; use submit or submit_batch", "idempotency_key")
