# SPDX-License-Identifier: Apache-2.0
"""The units that log in as a user of Redis, and their restart with a new password.

Workers are restarted by gpuinfer-roll.service, as after an upgrade: each when the one before it is ready
again, as policy-rc.d allows, and never by two rolls at once.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

UNITS: Mapping[str, Sequence[str]] = {
    "admin": ("gpuinfer-flower.service",),
    "api": ("gpuinfer-api.service",),
    "watcher": ("gpuinfer-watcher.service",),
    "worker": ("gpuinfer-worker@*.service",),
    "operator": (),
    "viewer": (),
}
ROLL = "gpuinfer-roll.service"
#: The folder in which systemd/roll finds its requests.
ASKED = Path("/run/gpuinfer-upgrade")
#: The request for a restart of the workers.
WANTED = "new password of worker"
#: Attempts: a request made at the moment when a roll begins may be missed.
_TIMES = 3


def running(user: str) -> list[str]:
    """Return the running units that log in as a user."""
    if not UNITS[user] or shutil.which("systemctl") is None:
        return []
    command = ["systemctl", "list-units", "--plain", "--no-legend", "--state=active,activating,reloading"]
    said = subprocess.run([*command, *UNITS[user]], check=False, capture_output=True, text=True).stdout
    return [words[0] for words in map(str.split, said.splitlines()) if words]


def restart(units: Sequence[str], say: Callable[[str], object]) -> Iterator[tuple[str, bool]]:
    """Restart units that run; yield each with whether it came back, as soon as that is known.

    Raises OSError where gpuinfer-roll cannot be started.
    """
    workers = [unit for unit in units if unit.startswith("gpuinfer-worker@")]
    for unit in units:
        if unit not in workers:
            say(f"restarting {unit}")
            yield unit, _restarted(unit)
    if workers:
        count = "1 worker" if len(workers) == 1 else f"{len(workers)} workers, one after the other"
        say(f"{ROLL} restarts {count} (journalctl -fu gpuinfer-roll)")
        yield from _rolled(workers)


def _restarted(unit: str) -> bool:
    subprocess.run(["systemctl", "reset-failed", unit], check=False, capture_output=True)
    return subprocess.run(["systemctl", "try-restart", unit], check=False).returncode == 0


def _rolled(units: Sequence[str]) -> Iterator[tuple[str, bool]]:
    before = {unit: _state(unit)[0] for unit in units}
    for _ in range(_TIMES):
        _ask()
        # A start while another roll runs waits for it; that one does this request, too, or runs again at its
        # end.
        while subprocess.run(["systemctl", "start", ROLL], check=False).returncode == 0 and _asked().exists():
            pass
        after = {unit: _state(unit) for unit in units}
        if any(invocation != before[unit] for unit, (invocation, _) in after.items()):
            break
    for unit, (invocation, state) in after.items():
        if state != "inactive":  # the watcher has stopped it meanwhile
            yield unit, state == "active" and invocation != before[unit]


def _ask() -> None:
    """Write the request; a roll that starts may move the folder away meanwhile, so try twice."""
    for last in (False, True):
        try:
            ASKED.mkdir(exist_ok=True)
            with _asked().open("a", encoding="utf-8") as file:
                file.write(f"{WANTED}\n")
        except FileNotFoundError:
            if last:
                raise
        else:
            return


def _asked() -> Path:
    return ASKED / "wanted"


def _state(unit: str) -> tuple[str, str]:
    """Return the invocation id and the state of a unit; empty where systemd does not answer."""
    command = ["systemctl", "show", "-p", "InvocationID", "-p", "ActiveState", unit]
    said = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    found = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    return found.get("InvocationID", ""), found.get("ActiveState", "")


__all__ = ["ASKED", "ROLL", "UNITS", "WANTED", "restart", "running"]
