# SPDX-License-Identifier: Apache-2.0
"""The HTTP front: does it listen, and does it call itself ready."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Mapping

import orjson

from gpuinfer.doctor.finding import Finding, Skipped, error, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.units import SOCKET, address, show, who_listens

_LIMIT_S = 10.0
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def ready(host: Host) -> Finding:
    """The API listens, and says that it is ready."""
    name, port = address(host)
    where = f"{name}:{port}"
    try:
        status, body = _get(_ANY.get(name, name), port, "/health/ready", tls=bool(host.settings.api.tls_cert))
    except ConnectionRefusedError:
        return _refused(host, where)
    except (OSError, http.client.HTTPException) as exc:
        return error(f"the API at {where} does not answer: {exc}", "systemctl restart gpuinfer-api")
    if _is_a_strangers(host):
        return error(f"what answers at {where} is another program, which has our port", who_listens(port))
    if status == http.client.OK:
        return ok(f"the API at {where} is ready")
    return warning(f"the API at {where} is not ready: {_reason(body)}", "gpuinfer doctor redis work")


def _get(name: str, port: int, path: str, *, tls: bool) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(name, port, timeout=_LIMIT_S)
    if tls:  # the certificate is for the name that clients use, which is not this address
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(name, port, timeout=_LIMIT_S, context=context)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        answer = connection.getresponse()
        return answer.status, answer.read(4096)
    finally:
        connection.close()


def _is_a_strangers(host: Host) -> bool:
    """Tell whether our socket could not listen, so that another program answers there."""
    try:
        socket = show(host, [SOCKET], "ActiveState,Result")[0]
    except Skipped:
        return False
    return socket.get("ActiveState") == "failed" and socket.get("Result") == "resources"


def _refused(host: Host, where: str) -> Finding:
    """Without our unit nobody need listen; with it, somebody must."""
    if not host.path("/run/systemd/system").is_dir():
        raise Skipped(f"nobody listens at {where}, and without systemd nobody need")
    if show(host, [SOCKET], "LoadState")[0].get("LoadState") != "loaded":
        raise Skipped(f"nobody listens at {where}, and the package is not installed")
    return error(f"nobody listens at {where}", f"systemctl enable --now {SOCKET}")


def _reason(body: bytes) -> str:
    try:
        answer = orjson.loads(body)
        said = answer.get("error") if isinstance(answer, Mapping) else None
        return str(said.get("message", said)) if isinstance(said, Mapping) else body.decode()[:200]
    except ValueError:
        return repr(body[:100])
