# SPDX-License-Identifier: Apache-2.0
"""The host as the checks see it: settings, files, commands, the GPUs. Tests put another in its place."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from gpuinfer.doctor import child
from gpuinfer.doctor.finding import Skipped
from gpuinfer.doctor.nvml import Report, from_json
from gpuinfer.errors import ConfigError
from gpuinfer.settings import Loaded, Settings

if TYPE_CHECKING:
    import redis

COMMAND_LIMIT_S = 10.0
NVML_LIMIT_S = 20.0


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


def ask_nvml() -> Report:
    """Ask NVML in a child process. Raises ChildFailed, ChildHung."""
    return from_json(child.ask_nvml(NVML_LIMIT_S))


@dataclass
class Host:
    """One look at a host; what is costly to ask is asked once."""

    loaded: Loaded
    #: Where /etc, /proc, /sys, /dev and /var are looked for.
    root: Path = Path("/")
    run: Callable[[Sequence[str]], subprocess.CompletedProcess[str]] = run_command
    nvml: Callable[[], Report] = ask_nvml
    #: A connection to Redis that is open already; else each check opens its own.
    client: redis.Redis | None = None
    _report: Report | Exception | None = field(default=None, init=False)
    _lock: Lock = field(default_factory=Lock, init=False)

    @property
    def settings(self) -> Settings:
        """Return the settings. Raises Skipped when they are wrong, which is one check's business alone."""
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

    def gpus(self) -> Report:
        """Return what NVML says, asked once. Raises ChildFailed, ChildHung to each caller."""
        with self._lock:
            if self._report is None:
                try:
                    self._report = self.nvml()
                except Exception as exc:
                    self._report = exc
        if isinstance(self._report, Exception):
            raise self._report
        return self._report

    def may_have_gpus(self) -> bool:
        """Tell whether a GPU or its driver is here; where the driver cannot even be asked, one is."""
        try:
            found = self.gpus().inventory
        except Exception:
            return True
        return bool(found.gpus or found.broken or found.failed)

    def some_gpus(self) -> Report:
        """Return what NVML says where it lists a GPU. Raises Skipped elsewhere: gpu.driver says why."""
        try:
            report = self.gpus()
        except Exception:
            raise Skipped("NVML cannot be asked; see gpu.driver") from None
        if not report.inventory.gpus:
            raise Skipped(report.inventory.reason or "there is no GPU")
        return report

    def need_systemd(self) -> None:
        """Raise Skipped on a host that was not booted with systemd."""
        if not self.path("/run/systemd/system").is_dir():
            raise Skipped("this host does not run systemd")
