# SPDX-License-Identifier: Apache-2.0
"""The host as the checks see it, and what a check finds there. Tests put another host in its place."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Literal, get_args

from gpuinfer.doctor.nvml import Report, ask
from gpuinfer.errors import ConfigError
from gpuinfer.settings import Loaded, Settings

if TYPE_CHECKING:
    import redis

Status = Literal["ok", "warning", "error", "skipped"]
STATUSES: tuple[Status, ...] = get_args(Status)
#: Opens the settings; ``editor`` is Debian's name for whichever editor there is.
EDIT = "editor /etc/gpuinfer/gpuinfer.toml"
COMMAND_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report."""

    status: Status
    message: str
    #: A command to paste that fixes the fault or shows more; empty when there is nothing to do.
    remedy: str = ""
    #: Name of the check; the runner fills it in.
    check: str = ""


Findings = Finding | Sequence[Finding]


class Skipped(Exception):
    """Raised when a check does not apply to this host, or may not be made by this user."""


#: All is well.
ok = partial(Finding, "ok")
#: What costs something now or may fail later; with a remedy.
warning = partial(Finding, "warning")
#: What keeps this host from working; with a remedy.
error = partial(Finding, "error")


def run_command(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in plain English, whatever its exit status. Raises Skipped where it is not installed."""
    path = shutil.which(command[0], path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if path is None:
        raise Skipped(f"{command[0]} is not installed")
    return subprocess.run(
        [path, *command[1:]],
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=COMMAND_LIMIT_S,
        env={**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""},
    )


@dataclass
class Host:
    """A host as one run of the doctor sees it; what is costly to ask is asked once."""

    loaded: Loaded
    #: Where /etc, /proc, /sys, /dev and /var are looked for.
    root: Path = Path("/")
    run: Callable[[Sequence[str]], subprocess.CompletedProcess[str]] = run_command
    nvml: Callable[[], Report] = ask
    #: A connection to Redis that is open already; else each check opens its own.
    client: redis.Redis | None = None
    _report: Report | None = field(default=None, init=False)
    _lock: Lock = field(default_factory=Lock, init=False)

    @property
    def settings(self) -> Settings:
        """Return the settings. Raises Skipped when they are wrong: only config.file reports that."""
        try:
            return self.loaded.settings
        except ConfigError:
            raise Skipped("the settings cannot be read; see config.file") from None

    def path(self, absolute: str | Path) -> Path:
        """Return where a file of this host lies."""
        return self.root / str(absolute).lstrip("/")

    def read(self, absolute: str | Path) -> str:
        """Return a file's text, stripped. Raises Skipped when it is not there or not for us to read."""
        try:
            return self.path(absolute).read_text(encoding="utf-8", errors="replace").strip()
        except OSError as exc:
            raise Skipped(f"{absolute} cannot be read: {exc.strerror or exc}") from None

    def secret(self, absolute: str | Path, wanted: int) -> Iterator[Finding]:
        """Yield what is wrong with mode and owner of a secret's file or folder. Raises OSError."""
        status = self.path(absolute).stat()
        mode = stat.S_IMODE(status.st_mode)
        if mode & ~wanted:
            fix = f"chmod {wanted:04o} {absolute}"
            yield error(f"{absolute} has mode {mode:04o}: others may read or change secrets", fix)
        if status.st_uid != 0:
            text = f"{absolute} belongs to user {status.st_uid}, who may change it"
            yield error(text, f"chown root {absolute}")

    def gpus(self) -> Report:
        """Return what NVML says, asked once: a driver that hangs costs its limit once."""
        with self._lock:
            if self._report is None:
                self._report = self.nvml()
        return self._report

    def may_have_gpus(self) -> bool:
        """Tell whether a GPU or its driver is here; where the driver does not answer, one is."""
        found = self.gpus().inventory
        return bool(found.gpus or found.broken or found.failed)

    def some_gpus(self) -> Report:
        """Return what NVML says where it counts a GPU. Raises Skipped elsewhere."""
        found = self.gpus().inventory
        if found.failed and not found.broken:
            raise Skipped("NVML cannot be asked; see gpu.driver")
        if not found.gpus and not found.broken:
            raise Skipped(found.reason)
        return self.gpus()

    @property
    def booted(self) -> bool:
        """Tell whether this host runs systemd."""
        return self.path("/run/systemd/system").is_dir()

    def need_systemd(self) -> None:
        """Raise Skipped on a host that was not booted with systemd."""
        if not self.booted:
            raise Skipped("this host does not run systemd")
