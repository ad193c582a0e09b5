# SPDX-License-Identifier: Apache-2.0
"""Flower on our queues: how many tasks wait by queue and model, and nobody in without a login.

Flower knows kombu's own transports by their URLs, and of a queue the lists of one model. What it shows of
workers and tasks is what they tell themselves.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from flower import command, views
from flower.utils import strtobool

from gpuinfer.errors import ConfigError
from gpuinfer.log import get_logger
from gpuinfer.queue import depth
from gpuinfer.queue.connection import connect_async
from gpuinfer.queue.depth import Depth, Lane
from gpuinfer.settings import QUEUES, BrokerSettings

log = get_logger(__name__)

#: Who logs in; and where the password lies on an installed host, and under which name systemd hands it over.
USER = "admin"
PASSWORD = Path("/etc/gpuinfer/credentials/flower")
_HANDED = "flower_password"
_LOOPBACK = "127.0.0.1"
#: Flower's own variable: no login for its API, and here for none of it.
_OPEN = "FLOWER_UNAUTHENTICATED_API"


class Queues:
    """What Flower takes for its broker."""

    def __init__(self, broker: BrokerSettings) -> None:
        self._broker = broker

    async def queues(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Return what waits, by queue and model; ``names``, which workers give their queues, do not count."""
        client = connect_async(self._broker, max_connections=1)
        try:
            return rows(await depth.aread(client))
        finally:
            await client.aclose()


def rows(seen: Depth) -> list[dict[str, Any]]:
    """Return a row for each queue of each model, ``realtime.resnet``, also where nothing waits."""
    lanes = {*seen.lanes, *(Lane(tier, model) for tier in QUEUES for model in seen.catalogue)}
    found = []
    for lane in sorted(lanes, key=lambda lane: (QUEUES.index(lane.tier), lane.model)):
        count = sum(seen.lanes.get(lane, {}).values())
        found.append({"name": lane.name, "messages": count, "messages_ready": count})
    return found


def prepare() -> None:
    """Have Flower ask us for the queues, and for a login unless its options say how else one gets in."""

    def get_broker(handler: Any) -> Queues:
        return Queues(handler.capp.gpuinfer_settings().broker)

    settle = command.extract_settings

    def extract_settings() -> None:
        close(command.options, os.environ)
        settle()

    views.BaseHandler.get_broker = get_broker
    command.extract_settings = extract_settings


def close(options: Any, environment: Mapping[str, str]) -> None:
    """Let nobody in without a login, nor from the network, unless Flower's options say so.

    Raises ConfigError where the password's file is empty or Flower's variable says neither yes nor no.
    """
    if not (options.address or options.unix_socket):
        options.address = _LOOPBACK
    if options.basic_auth or options.auth or _open(environment):
        return
    password, where = password_of(environment)
    options.basic_auth = [f"{USER}:{password}"]
    if where is None:  # no log has it
        click.echo(f"log in as {USER} with {password}, for this run; --basic_auth=USER:PASSWORD sets another")
    else:
        log.info("login", user=USER, password_in=str(where))


def _open(environment: Mapping[str, str]) -> bool:
    """Tell whether anybody may in, as Flower reads that. Raises ConfigError."""
    said = environment.get(_OPEN) or "false"
    try:
        return bool(strtobool(said))
    except ValueError:
        raise ConfigError(f"must be true or false, got {said!r}", _OPEN) from None


def password_of(environment: Mapping[str, str]) -> tuple[str, Path | None]:
    """Return the password and the file where an administrator finds it; None: it was made for this run.

    Raises ConfigError for a file that holds none.
    """
    handed = environment.get("CREDENTIALS_DIRECTORY")
    file = Path(handed, _HANDED) if handed else PASSWORD
    try:
        found = file.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, PermissionError):
        return secrets.token_hex(16), None
    if not found:
        raise ConfigError("holds no password; `dpkg-reconfigure gpuinfer` makes one", str(PASSWORD))
    return found, PASSWORD if handed else file
