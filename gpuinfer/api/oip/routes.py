# SPDX-License-Identifier: Apache-2.0
"""The paths below ``/v2``. Plain ASGI, because infer is a hot path and errors have their own format.

A model's versions are those of live workers; each is the beginning of its folder's digest. If there are
several, a request that names one is refused. Load and unload change nothing, because workers load the models
of their setting ``worker.models`` at their start. Load answers 200 if a live worker serves the model, unload
if none does; otherwise the error says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

from gpuinfer import __version__
from gpuinfer.api.access import audit, check_model, sees_model
from gpuinfer.api.admission import parse_json
from gpuinfer.api.health import readiness_for
from gpuinfer.api.oip.errors import NotInProtocol, NotSupported, WrongMethod, send_error
from gpuinfer.api.reply import answered, send_json
from gpuinfer.api.shared import shared
from gpuinfer.api.submission import read_body
from gpuinfer.errors import InputError, NotReady, UnknownModel
from gpuinfer.log import get_logger
from gpuinfer.models.signature import Input, Output, Signature
from gpuinfer.queue.readiness import Capacity

log = get_logger(__name__)

PREFIX = "/v2"
EXTENSIONS = ("binary_tensor_data", "classification", "model_repository")
_MODEL = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?"
_READY, _NOT_READY = "READY", "UNAVAILABLE"

Route = Callable[[Scope, Receive, Send, Mapping[str, str]], Awaitable[None]]


async def serve(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request for a path below ``/v2``."""
    await answered(scope, send, _serve(scope, receive, send), send_error)


async def _serve(scope: Scope, receive: Receive, send: Send) -> None:
    method, path = scope["method"], scope["path"]
    for verb, pattern, route in ROUTES:
        if found := pattern.fullmatch(path):
            if method != verb:
                raise WrongMethod(f"{path[:200]} takes {verb}, not {method[:20]}")
            await route(scope, receive, send, found.groupdict(""))
            return
    raise NotInProtocol(f"there is no {path[:200]}; see the Open Inference Protocol, version 2")


def _check_version(capacity: Capacity, found: Mapping[str, str]) -> None:
    """Raises UnknownModel for a version that no live worker has. A path without a version matches any."""
    model, version = found["model"], found["version"]
    known = capacity.versions.get(model, ())
    if version and version not in known:
        said = ", ".join(known) or "none"
        raise UnknownModel(
            f"no live worker has version {version[:80]!r} of model {model[:80]}; they have {said}", "version"
        )


# -- the server -----------------------------------------------------------------------------


async def _live(scope: Scope, receive: Receive, send: Send, found: Mapping[str, str]) -> None:
    await send_json(scope, send, {"live": True})


async def _ready(scope: Scope, receive: Receive, send: Send, found: Mapping[str, str]) -> None:
    """Answer like ``/health/ready``."""
    await shared(scope).client.ping()
    readiness_for(scope, await shared(scope).client.capacity())
    await send_json(scope, send, {"ready": True})


async def _server(scope: Scope, receive: Receive, send: Send, found: Mapping[str, str]) -> None:
    about = {"name": "gpuinfer", "version": __version__, "extensions": EXTENSIONS}
    await send_json(scope, send, about)


# -- a model --------------------------------------------------------------------------------


async def _model(scope: Scope, receive: Receive, send: Send, found: Mapping[str, str]) -> None:
    from gpuinfer.api.oip.infer import signature_of  # imports numpy, only if used

    model = found["model"]
    check_model(scope, model)
    signature = await signature_of(scope, model)
    capacity = await shared(scope).client.capacity()
    _check_version(capacity, found)
    about = {
        "name": model,
        "versions": capacity.versions.get(model, ()),
        "platform": "gpuinfer",
        "inputs": [_input(one, signature) for one in signature.inputs],
        "outputs": [_output(one, signature) for one in signature.outputs],
    }
    await send_json(scope, send, about)


def _input(one: Input, signature: Signature) -> dict[str, Any]:
    if one.kind != "tensor":
        return _described(one.name, None, (), signature)
    return _described(one.name, one.dtype or "float32", one.shape, signature)


def _output(one: Output, signature: Signature) -> dict[str, Any]:
    return _described(one.name, one.dtype or "float32", one.shape, signature)


def _described(
    name: str, dtype: str | None, shape: tuple[int, ...] | None, signature: Signature
) -> dict[str, Any]:
    """Return the metadata of a tensor: the first dimension is the batch; unknown dimensions are -1."""
    from gpuinfer.api.oip.inputs import DATATYPES

    batch = [-1] if signature.batchable else []
    return {
        "name": name,
        "datatype": "BYTES" if dtype is None else DATATYPES[dtype],
        "shape": [*batch, *((-1,) if shape is None else shape)],
    }


async def _model_ready(scope: Scope, receive: Receive, send: Send, found: Mapping[str, str]) -> None:
    """Answer 200 if a live worker serves the model."""
    check_model(scope, found["model"])
    capacity = await shared(scope).client.capacity()
    _serving(capacity, found["model"])
    _check_version(capacity, found)
    await send_json(scope, send, {"name": found["model"], "ready": True})


def _serving(capacity: Capacity, model: str) -> bool:
    """Return True. Raises UnknownModel, or NotReady if no live worker serves the model."""
    _known(capacity, model)
    if not capacity.of(model).live:
        raise NotReady(
            f"no live worker serves model {model}; add it to worker.models on a host and restart its worker",
            "model",
        )
    return True


def _known(capacity: Capacity, model: str) -> None:
    if not capacity.knows(model):
        known = ", ".join(capacity.catalogue) or "none"
        raise UnknownModel(f"the fleet knows no model {model[:80]!r}; known: {known}", "model")


async def _infer(scope: Scope, receive: Receive, send: Send, found: Mapping[str, str]) -> None:
    from gpuinfer.api.oip.infer import infer  # imports numpy, only if used

    check_model(scope, found["model"])
    if found["version"]:
        capacity = await shared(scope).client.capacity()
        _serving(capacity, found["model"])
        _check_version(capacity, found)
        if len(known := capacity.versions[found["model"]]) > 1:
            raise NotSupported(
                f"workers have versions {', '.join(known)} of it, and any worker may run a request: "
                "leave out the version",
                "version",
            )
    await infer(scope, receive, send, found["model"], found["version"])


# -- the repository -------------------------------------------------------------------------


async def _index(scope: Scope, receive: Receive, send: Send, found: Mapping[str, str]) -> None:
    """List the models of the fleet; with ``{"ready": true}`` only those that a live worker serves."""
    body = await read_body(scope, receive, shared(scope).settings.queue.max_payload_bytes)
    asked = parse_json(body) if body.strip() else {}
    only = asked.get("ready", False) if isinstance(asked, dict) else None
    if not isinstance(only, bool):
        raise InputError('must be an object such as {"ready": true}', "body")
    capacity = await shared(scope).client.capacity()
    states = [one for one in _states(capacity) if sees_model(scope, one["name"])]
    await send_json(scope, send, [one for one in states if not only or one["state"] == _READY])


def _states(capacity: Capacity) -> list[dict[str, str]]:
    served = {model for one in capacity.live.values() for model in one.models}
    return [
        {
            "name": name,
            "version": version,
            "state": _READY if name in served else _NOT_READY,
            "reason": "" if name in served else "no live worker serves it",
        }
        for name in sorted({*capacity.catalogue, *served})
        for version in capacity.versions.get(name) or ("",)
    ]


async def _load(scope: Scope, receive: Receive, send: Send, found: Mapping[str, str]) -> None:
    """Answer 200 if a live worker serves the model: it is loaded then."""
    audit(scope, found["model"])
    _serving(await shared(scope).client.capacity(), found["model"])
    await send_json(scope, send, {})


async def _unload(scope: Scope, receive: Receive, send: Send, found: Mapping[str, str]) -> None:
    """Answer 200 if no live worker serves the model; requests cannot unload it from a worker."""
    audit(scope, found["model"])
    model, capacity = found["model"], await shared(scope).client.capacity()
    _known(capacity, model)
    if live := capacity.of(model).live:
        raise NotSupported(
            f"model {model} is served by {', '.join(sorted(live)[:3])}: remove it from worker.models "
            "there and restart the worker",
            "model",
        )
    await send_json(scope, send, {})


ROUTES: tuple[tuple[str, re.Pattern[str], Route], ...] = tuple(
    (verb, re.compile(pattern), route)
    for verb, pattern, route in (
        ("POST", rf"{_MODEL}/infer", _infer),
        ("GET", r"/v2/health/live", _live),
        ("GET", r"/v2/health/ready", _ready),
        ("GET", r"/v2", _server),
        ("GET", _MODEL, _model),
        ("GET", rf"{_MODEL}/ready", _model_ready),
        ("POST", r"/v2/repository/index", _index),
        ("POST", r"/v2/repository/models/(?P<model>[^/]+)/load", _load),
        ("POST", r"/v2/repository/models/(?P<model>[^/]+)/unload", _unload),
    )
)
