# SPDX-License-Identifier: Apache-2.0
"""What each instance of this host would serve by its settings. They are read again when they change."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import redis

from gpuinfer import instances
from gpuinfer.errors import ConfigError, ModelError
from gpuinfer.log import get_logger
from gpuinfer.models.repository import Repository
from gpuinfer.models.signature import Signature
from gpuinfer.queue.catalogue import described_as
from gpuinfer.queue.connection import explain
from gpuinfer.queue.fleet import Serves, serves_of
from gpuinfer.queue.scripts import bind
from gpuinfer.settings import Settings, load, settings_file
from gpuinfer.sources import file_state
from gpuinfer.watcher.state import Instance

log = get_logger(__name__)

#: Announce this often which models this host could serve.
ANNOUNCE_EVERY_S = 60.0
Environment = Callable[[int], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class _Read:
    """An instance's settings, and what they were read from."""

    source: object
    settings: Settings


def of_units(number: int) -> Mapping[str, str]:
    """Return the variables with settings in the environment in which systemd starts an instance."""
    named = os.environ.get("GPUINFER_CONFIG")
    return {**({"GPUINFER_CONFIG": named} if named else {}), **instances.read(number)}


def beside_settings(number: int) -> Mapping[str, str]:
    """Return the variables of the file beside the settings file that belongs to one plain process."""
    return instances.read(number, settings_file().parent)


def of_processes(number: int) -> Mapping[str, str]:
    """Return the environment in which an instance is started as a plain process."""
    return {**os.environ, **beside_settings(number)}


class Served:
    """The settings of each instance. Blocking: call it in a thread."""

    def __init__(self, settings: Settings, environment: Environment | None = None) -> None:
        """Without ``environment``, all instances have the same settings."""
        self._settings = settings
        self._environment = environment
        self._read: dict[int, _Read] = {}
        self._wrong: dict[int, str] = {}
        self._no_models = ""

    def serves(self, number: int) -> Serves:
        """Return what an instance would serve if it were started now."""
        worker = self._of(number).worker
        return serves_of(worker.queues, worker.models)

    def _of(self, number: int) -> Settings:
        if self._environment is None:
            return self._settings
        try:
            environ = self._environment(number)
            source = (environ, file_state(settings_file(environ=environ)))
            known = self._read.get(number)
            if known is None or known.source != source:
                known = _Read(source, load(environ=environ, only={"worker", "models"}).settings)
                self._read[number] = known
        except (ConfigError, OSError) as exc:
            self._say_wrong(number, str(exc))
            return self._settings
        self._wrong.pop(number, None)
        return known.settings

    def _say_wrong(self, number: int, reason: str) -> None:
        if self._wrong.get(number) != reason:
            hint = "it counts as serving what all serve; gpuinfer doctor gpu.binding has the details"
            log.warning("instance_settings_unreadable", instance=number, reason=reason, hint=hint)
        self._wrong[number] = reason

    def installed(self, numbers: Iterable[int]) -> dict[str, Signature | None]:
        """Return the models that these instances would serve and that are installed here, sorted by name.

        With their signatures, where these are known without running the model's code.
        """
        asked: dict[tuple[Path, ...], set[str]] = {}
        for number in numbers:
            settings = self._of(number)
            asked.setdefault(tuple(settings.models.folders), set()).update(settings.worker.models)
        try:
            there = {folders: Repository(folders).entries() for folders in asked}
        except ModelError as exc:
            if self._no_models != str(exc):
                hint = "let the watcher's user read models.folders; until then only workers announce models"
                log.warning("models_not_listed", reason=str(exc), hint=hint)
            self._no_models = str(exc)
            return {}
        self._no_models = ""
        found = {
            entry.name: entry.folder.signature
            for folders, names in asked.items()
            for entry in there[folders]
            if entry.folder is not None and entry.name in names
        }
        return dict(sorted(found.items()))


class Announcer:
    """Announces which models this host could serve, so that requests for one are accepted earlier.

    Blocking: call it in a thread.
    """

    def __init__(self, client: redis.Redis, host: str, served: Served) -> None:
        self._name = f"watcher@{host}"
        self._served = served
        self._know, self._describe = bind(client, "know"), bind(client, "describe")
        self._told_at = -math.inf
        self._refused = ""

    def again(self) -> None:
        """Announce at the next step: Redis came back empty, and knows no model."""
        self._told_at = -math.inf

    def step(self, own: Iterable[Instance]) -> None:
        """Announce the installed models of these instances and their signatures, once a minute."""
        if time.monotonic() - self._told_at < ANNOUNCE_EVERY_S:
            return
        models = self._served.installed(one.key.number for one in own if not one.masked)
        described = {name: one for name, one in models.items() if one is not None}
        try:
            if models:
                self._know(keys=[], args=[*models])
            if described:
                self._describe(keys=[], args=described_as(self._name, described))
        except (redis.RedisError, OSError) as exc:  # workers announce theirs too
            if str(exc) != self._refused:
                hint = "models that no worker has loaded yet are refused; gpuinfer doctor redis.users"
                log.warning("models_not_made_known", reason=str(explain(exc)), hint=hint)
            self._refused = str(exc)
            return
        self._told_at, self._refused = time.monotonic(), ""
