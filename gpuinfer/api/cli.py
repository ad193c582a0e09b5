# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer api``: run the HTTP API until SIGTERM or SIGINT."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuinfer.cli_help import examples
from gpuinfer.errors import AddressUnavailable, BrokerError, UsageError

if TYPE_CHECKING:
    import socket

    from gpuinfer.api.tls import Certificate
    from gpuinfer.settings import Loaded, Settings

#: Seconds to wait for Redis's format at the start; without an answer the API starts anyway.
FORMAT_CHECK_S = 2.0


@click.command(
    epilog=examples(
        "gpuinfer api --port 8080", "curl -d '{\"inputs\": [[...]]}' http://127.0.0.1:8080/predict"
    )
)
@click.option(
    "--host",
    metavar="HOST",
    help="Address to listen on, or a name for all its addresses. Default: api.host.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Port to listen on; 0: any free port. Default: api.port."
)
@click.option("--socket", "path", type=click.Path(path_type=Path), help="Listen on this Unix socket instead.")
@click.option(
    "--fd",
    type=click.IntRange(0),
    help="Listen on this open descriptor, and on all sockets from systemd (socket activation: 3).",
)
@click.pass_context
def api(ctx: click.Context, host: str | None, port: int | None, path: Path | None, fd: int | None) -> None:
    """Run the HTTP API. Its documentation is at /docs.

    SIGTERM and SIGINT stop it with exit code 0, after it has answered the accepted requests. With --fd and
    wrong settings it answers 503 until they are corrected.
    """
    loaded: Loaded = ctx.obj.when_written()
    if sum((host is not None or port is not None, path is not None, fd is not None)) > 1:
        raise UsageError("give only one of: --host and --port; --socket; --fd")
    if fd is not None:
        _run_handed(loaded, fd, ctx.find_root().params.get("file"))
        return
    settings = loaded.settings
    if host is not None or port is not None:
        given = {"host": host, "port": port}
        update = {name: value for name, value in given.items() if value is not None}
        settings = settings.model_copy(update={"api": settings.api.model_copy(update=update)})
    run(settings, path=path)


def run(settings: Settings, *, path: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT. Raises AddressUnavailable, ConfigError and UnusableRedis."""
    from gpuinfer.api.server import listen, listen_unix

    certificate = _prepare(settings)
    host, port = settings.api.host, settings.api.port
    listeners = [listen_unix(path)] if path is not None else listen(host, port)
    try:
        _serve(settings, listeners, certificate)
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


def _run_handed(loaded: Loaded, fd: int, file: Path | None) -> None:
    """Serve on inherited sockets; answer 503 while the settings are wrong.

    ``file``: the path from --config. Raises AddressUnavailable.
    """
    from gpuinfer.api.misconfigured import keys_dir, wait_for
    from gpuinfer.api.server import inherited
    from gpuinfer.log import configure
    from gpuinfer.settings import LogSettings, Settings, settings_file

    def prepare() -> tuple[Settings, Certificate | None]:
        settings = loaded.only(*Settings.model_fields)  # reads the file again each time
        return settings, _prepare(settings)

    configure(LogSettings(), program="gpuinfer-api")
    listeners = inherited(fd)
    path = settings_file(file)
    found = wait_for(prepare, listeners, path, partial(keys_dir, loaded, path))
    if found is not None:
        settings, certificate = found
        _serve(settings, listeners, certificate)


def _prepare(settings: Settings) -> Certificate | None:
    """Set up the log, and check what the API needs to serve; return its certificate.

    Raises ConfigError and UnusableRedis.
    """
    from gpuinfer.log import configure

    configure(settings.log, program="gpuinfer-api")
    _check_format(settings)
    return _certificate(settings)


def _serve(settings: Settings, listeners: list[socket.socket], certificate: Certificate | None) -> None:
    """Serve on open sockets until SIGTERM or SIGINT, then close them."""
    metrics = _metrics_listeners(settings)

    from gpuinfer.queue.scripts import read_all

    read_all()

    from gpuinfer.api.front import Front
    from gpuinfer.api.processes import supervise
    from gpuinfer.api.server import Server

    # The API logs start and stop itself, with fields.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    try:
        if settings.api.processes > 1:
            supervise(settings, listeners, certificate, metrics)
        else:
            front = Front(settings, metrics=metrics)
            Server(front, front.shared, certificate=certificate).run(sockets=listeners)
    finally:
        for listener in (*listeners, *metrics):
            listener.close()


def _check_format(settings: Settings) -> None:
    """Raise UnusableRedis if Redis has another format. If Redis does not answer, the API starts anyway."""
    from gpuinfer.queue.connection import connect, typed_errors, user_of

    with (
        suppress(BrokerError),
        typed_errors(user_of(settings.broker)),
        connect(settings.broker, retries=0) as client,
    ):
        options = client.connection_pool.connection_kwargs
        for name in {"socket_timeout", "socket_connect_timeout"} & options.keys():
            options[name] = min(options[name], FORMAT_CHECK_S)
        client.ping()


def _certificate(settings: Settings) -> Certificate | None:
    """Return the certificate of api.tls_cert. Raises ConfigError."""
    from gpuinfer.api.tls import Certificate

    cert = settings.api.tls_cert
    return None if cert is None else Certificate(cert, settings.api.tls_key)


def _metrics_listeners(settings: Settings) -> list[socket.socket]:
    """Listen on metrics.listen. If that fails, the API serves without it."""
    from gpuinfer.api.server import listen, listen_unix
    from gpuinfer.log import get_logger

    where = settings.metrics.listen
    try:
        if where.startswith("unix:"):
            return [listen_unix(Path(where.removeprefix("unix:")))]
        host, _, port = where.rpartition(":")
        return listen(host.strip("[]"), int(port)) if where else []
    except AddressUnavailable as exc:
        hint = "check metrics.listen; in the service, SocketBindAllow= must allow its port"
        get_logger(__name__).error("metrics_unavailable", address=where, reason=exc.message, hint=hint)
        return []
