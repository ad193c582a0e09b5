# SPDX-License-Identifier: Apache-2.0
"""systemd's units: installed, enabled, running; for one that failed, its last words in the journal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from gpuinfer import instances as own
from gpuinfer.doctor.host import Finding, Findings, Host, Skipped, error, ok, warning
from gpuinfer.errors import ConfigError
from gpuinfer.journal.last_words import EXITED, PROPERTIES, last_words
from gpuinfer.journal.units import read_units
from gpuinfer.plural import many

#: What the package enables: units that an appliance always has.
ALWAYS = (
    *("gpuinfer.target", "gpuinfer-redis.service", "gpuinfer-api.socket"),
    *("gpuinfer-api.service", "gpuinfer-watcher.service", "gpuinfer-workers.target"),
)
API, SOCKET, WATCHER = "gpuinfer-api.service", "gpuinfer-api.socket", "gpuinfer-watcher.service"
_WORKERS = "gpuinfer-worker@*.service"
_PROPERTIES = f"{PROPERTIES},LoadState,ActiveState,SubState,UnitFileState,NRestarts,Listen"
NUMBER = re.compile(r"worker@(\d+)\.")
_LISTENS = re.compile(r"(?m)^\[?([^]\n]+?)\]?:(\d+) \(Stream\)$")
_PATHS = re.compile(r"(?m)^(/.*) \(Stream\)$")

Unit = Mapping[str, str]


def show(host: Host, units: Sequence[str], properties: str = _PROPERTIES) -> list[dict[str, str]]:
    """Return the properties of units, in their order; of a pattern those that are loaded. Raises Skipped."""
    host.need_systemd()
    if not units:  # systemctl would show the manager itself
        return []
    done = host.run(["systemctl", "show", "-p", properties, *units])
    if done.returncode:
        raise Skipped(f"systemctl: {done.stderr.strip()}")
    return read_units(done.stdout)


def services(host: Host) -> Findings:
    """What the package enables is enabled and runs, and none of its other units has failed."""
    found = show(host, ALWAYS)
    if all(unit["LoadState"] == "not-found" for unit in found):
        raise Skipped("the package's units are not installed")
    shut = any(unit["Id"] == SOCKET and _cannot_listen(unit) for unit in found)
    # Without its socket the API cannot be started: one thing to fix, one finding.
    seen = [unit for unit in found if not (shut and unit["Id"] == API and unit["ActiveState"] == "inactive")]
    others = [unit for unit in show(host, ["gpuinfer*"]) if unit["Id"] not in ALWAYS]
    # A restore, say. Workers have a check of their own.
    seen += [unit for unit in others if unit["ActiveState"] == "failed" and "-worker@" not in unit["Id"]]
    bad = [trouble for unit in seen if (trouble := _trouble(host, unit, always=True))]
    return bad or ok(f"{len(found)} units enabled and running")


def workers(host: Host) -> Findings:
    """Every worker unit runs that was enabled or started; without one, the watcher starts some on demand."""
    names, idle = instances(host), ""
    if show(host, [WATCHER])[0].get("ActiveState") != "active":
        idle = "the watcher does not run"
    elif host.settings.watcher.decisions == "log":
        idle = "the watcher only logs (watcher.decisions)"
    if not names and not idle:
        return ok("no worker is enabled; the watcher starts them when work comes")
    if not names:
        text = f"no worker is enabled, and {idle}: nothing will be computed"
        return warning(text, "systemctl enable --now gpuinfer-worker@0")
    found = show(host, names)
    running = [unit["Id"] for unit in found if unit["ActiveState"] == "active"]
    # One that the watcher stopped, enabled or not, is as it should be.
    seen = [one for one in found if idle or (one["LoadState"], one["ActiveState"]) != ("loaded", "inactive")]
    bad = [trouble for unit in seen if (trouble := _trouble(host, unit, always=False))]
    return bad or ok(f"{len(running)} of {len(names)} workers run: {', '.join(running) or 'none at present'}")


def instances(host: Host) -> list[str]:
    """Return the worker units that are loaded, enabled or masked."""
    host.need_systemd()
    files = host.run(["systemctl", "list-unit-files", "--plain", "--no-legend", _WORKERS]).stdout
    names = {line.split()[0] for line in files.splitlines() if line.strip()}
    if not names:
        raise Skipped("the package's units are not installed")
    names |= {unit["Id"] for unit in show(host, [_WORKERS])}
    return sorted(name for name in names if not name.endswith("@.service"))


def _trouble(host: Host, unit: Unit, *, always: bool) -> Finding | None:
    """Return what is wrong with a unit; ``always``: it is to run at any time."""
    name, load, state = unit["Id"], unit["LoadState"], unit["ActiveState"]
    if load == "masked" and not always:
        return ok(f"{name} is masked, as the administrator wants")  # who keeps a GPU that way
    if load == "masked":
        return error(f"{name} is masked: it cannot be started", f"systemctl unmask {name}")
    if load != "loaded":
        return error(f"{name}: {load}", f"systemctl daemon-reload; systemd-analyze verify {name}")
    if _cannot_listen(unit):  # systemd's own words do not tell the reason
        (address, port), *_ = addresses(unit)
        why = "another program does, or the address is not this host's"
        return error(f"{name} cannot listen at {address}:{port}: {why}", who_listens(port))
    if state == "failed":
        return error(f"{name} failed {last_words(host.run, unit)}", _restart(unit))
    if unit["SubState"] == "auto-restart":
        return error(f"{name} does not stay up {last_words(host.run, unit)}", f"journalctl -u {name} -n 20")
    if state == "active" and int(unit.get("NRestarts") or 0) > 0:
        look = f"journalctl -u {name} -p warning -n 20; systemctl reset-failed {name}"
        return warning(f"{name} was restarted {many(int(unit['NRestarts']), 'time')}", look)
    return _not_running(unit, always=always)


def _not_running(unit: Unit, *, always: bool) -> Finding | None:
    """Return what is wrong with a unit that is not enabled, or is not running."""
    name, stopped = unit["Id"], unit["ActiveState"] == "inactive"
    if always and unit["UnitFileState"] == "disabled" and stopped:
        return warning(f"{name} is disabled and does not run", f"systemctl enable --now {name}")
    if always and unit["UnitFileState"] == "disabled":
        return warning(f"{name} is not enabled: it will not start at boot", f"systemctl enable {name}")
    # ExecCondition= said no: this host uses another one's Redis, and has none of its own to run.
    if always and stopped and unit.get("Result") != "exec-condition":
        return error(f"{name} does not run", f"systemctl start {name}")
    if not always and stopped and unit["UnitFileState"] == "enabled":
        return warning(f"{name} is enabled and does not run", f"systemctl start {name}")
    return None


def _restart(unit: Unit) -> str:
    """Return what starts a failed unit again; wrong settings are corrected first."""
    start = f"systemctl reset-failed {unit['Id']} && systemctl start {unit['Id']}"
    if (unit.get("ExecMainCode"), unit.get("ExecMainStatus")) != (EXITED, str(ConfigError.exit_code)):
        return start
    number = NUMBER.search(unit["Id"])
    edit = f"editor {own.file_of(int(number[1]))} && " if number else ""
    return f"{edit}gpuinfer config check && {start}"


def _cannot_listen(unit: Unit) -> bool:
    return unit["ActiveState"] == "failed" and unit.get("Result") == "resources" and bool(addresses(unit))


def addresses(unit: Unit) -> list[tuple[str, int]]:
    """Return all addresses with their ports of a socket unit."""
    return [(host, int(port)) for host, port in _LISTENS.findall(unit.get("Listen", ""))]


def listeners(host: Host) -> tuple[list[tuple[str, int]], list[str]]:
    """Return the API's TCP addresses and Unix sockets: systemd's; where there are none, the settings'."""
    api = host.settings.api
    unit = show(host, [SOCKET], "LoadState,Listen")[0] if host.booted else {}
    tcp, unix = addresses(unit), _PATHS.findall(unit.get("Listen", ""))
    return (tcp, unix) if tcp or unix else ([(api.host, api.port)], [])


def address(host: Host) -> tuple[str, int]:
    """Return where the API listens first."""
    api = host.settings.api
    return next(iter(listeners(host)[0]), (api.host, api.port))


def who_listens(port: int) -> str:
    """Return the command that names the program on our port, and what to do about it."""
    look = f"ss -ltnp sport = :{port}  # stop that program, or move ours: systemctl edit {SOCKET}"
    return f"{look}; then: systemctl start {SOCKET} gpuinfer-api"
