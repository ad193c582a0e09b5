# SPDX-License-Identifier: Apache-2.0
"""Whether the API answers, and a request comes back the whole way through."""

from __future__ import annotations

import http.client
import time
from contextlib import closing, suppress
from functools import partial

import orjson

from gpuinfer.certificate import unverified
from gpuinfer.client import Client
from gpuinfer.doctor.broker import asked
from gpuinfer.doctor.host import Finding, Host, Skipped, error, ok, warning
from gpuinfer.doctor.units import SOCKET, address, show, who_listens
from gpuinfer.errors import GpuinferError, InferenceError, InputError, UnknownModel, WaitTimeout
from gpuinfer.models.examples import example, keys_to_set, sample
from gpuinfer.models.repository import ModelFolder, Repository
from gpuinfer.queue import catalogue

_API_S = 10.0
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
#: How long a request is given to come back.
REQUEST_S = 20.0


def ready(host: Host) -> Finding:
    """The API listens, and says that it is ready."""
    name, port = address(host)
    where = f"{name}:{port}"
    unit = show(host, [SOCKET], "LoadState,Result")[0] if host.booted else {}
    try:
        status, body, plain = _get(_ANY.get(name, name), port, tls=bool(host.settings.api.tls_cert))
    except ConnectionRefusedError:
        if unit.get("LoadState") != "loaded":
            raise Skipped(f"nothing listens at {where}, and the package is not installed") from None
        return error(f"nothing listens at {where}", f"systemctl enable --now {SOCKET}")
    except (OSError, http.client.HTTPException) as exc:
        return error(f"the API at {where} does not answer: {exc}", "systemctl restart gpuinfer-api")
    if unit.get("Result") == "resources":
        return error(f"what answers at {where} is another program, which has our port", who_listens(port))
    if status == http.client.OK and not plain:
        return ok(f"the API at {where} is ready")
    try:
        why = orjson.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        why = body.decode(errors="replace")[:200]
    if plain:
        text = f"the API at {where} answers without TLS, though api.tls_cert is set: {why}"
        return error(text, "gpuinfer config check")
    return warning(f"the API at {where} is not ready: {why}", "gpuinfer doctor redis work")


def _get(name: str, port: int, *, tls: bool) -> tuple[int, bytes, bool]:
    """Return status and body; True: without ``tls``, as a front answers that cannot use its certificate."""
    # The certificate is for the name that clients use, which is not this address.
    kind = partial(http.client.HTTPSConnection, context=unverified()) if tls else http.client.HTTPConnection
    try:
        with closing(kind(name, port, timeout=_API_S)) as connection:
            connection.request("GET", "/health/ready", headers={"Connection": "close"})
            answer = connection.getresponse()
            return answer.status, answer.read(4096), False
    except OSError:
        with suppress(OSError, http.client.HTTPException):
            if tls:
                return *_get(name, port, tls=False)[:2], True
        raise


def request(host: Host) -> Finding:
    """A request with a model's example, or zeros, comes back through queue and worker."""
    settings = host.settings
    with asked(host) as client:
        fleet = catalogue.read(client)
    folder = choose(fleet, Repository(settings.models.folders))
    try:
        with Client(settings) as sender:
            return _round_trip(sender, folder)
    except GpuinferError as exc:
        return error(f"the request failed: {exc} ({exc.code})", "gpuinfer queue status; gpuinfer logs")


def choose(fleet: catalogue.Fleet, repository: Repository) -> ModelFolder:
    """Return a model that a live worker serves in realtime and that is installed here, the default one first.

    Raises Skipped.
    """
    for model in sorted(fleet.models.values(), key=lambda model: not model.default):
        if "realtime" in model.queues:
            with suppress(UnknownModel):
                return repository.get(model.name)
    raise Skipped("no live worker serves a model of this host in realtime; see gpuinfer queue status")


def _round_trip(client: Client, folder: ModelFolder) -> Finding:
    started, name, value = time.monotonic(), folder.manifest.name, sample(folder)
    if value is None:
        raise Skipped(f"{name} has no example to send; set inputs.NAME.example in its model.toml")
    # Of the lowest priority: it is to disturb nobody.
    task_id = client.submit(value, model=name, queue="realtime", priority=0, expires_s=REQUEST_S)
    try:
        client.result(task_id, REQUEST_S)
    except WaitTimeout:
        client.cancel(task_id)
        text = f"the request {task_id} for {name} did not come back in {REQUEST_S:g} s"
        return warning(f"{text}: its workers have more urgent work, or hang", "gpuinfer queue status")
    except (InputError, InferenceError) as exc:
        if example(folder) is not None:
            raise
        fix = f"gpuinfer model show {name}  # and set {keys_to_set(folder.manifest)}"
        return warning(f"{name} answers, and refuses a request of zeros: {exc.message}", fix)
    return ok(f"a request for {name} came back after {(time.monotonic() - started) * 1000:.0f} ms")
