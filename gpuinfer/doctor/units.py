# SPDX-License-Identifier: Apache-2.0
"""systemd's units: installed, enabled, running; for one that failed, the journal's last word."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from gpuinfer.doctor.finding import Finding, Findings, Skipped, error, ok, warning
from gpuinfer.doctor.host import Host

#: What the package enables: units that an appliance always has.
ALWAYS = (
    "gpuinfer.target",
    "gpuinfer-redis.service",
    "gpuinfer-api.socket",
    "gpuinfer-api.service",
    "gpuinfer-watcher.service",
    "gpuinfer-workers.target",
)
API, SOCKET, WATCHER = "gpuinfer-api.service", "gpuinfer-api.socket", "gpuinfer-watcher.service"
_PROPERTIES = "Id,LoadState,ActiveState,SubState,UnitFileState,Result,NRestarts,Listen"
_LISTENS = re.compile(r"(?m)^\[?([^]\n]+?)\]?:(\d+) \(Stream\)$")
_PATHS = re.compile(r"(?m)^(/.*) \(Stream\)$")

Unit = Mapping[str, str]


def show(host: Host, units: Sequence[str], properties: str = _PROPERTIES) -> list[Unit]:
    """Return the properties of units, in their order. Raises Skipped without systemd."""
    host.need_systemd()
    if not units:  # systemctl would show the manager itself
        return []
    done = host.run(["systemctl", "show", "-p", properties, *units])
    if done.returncode:
        raise Skipped(f"systemctl: {done.stderr.strip()}")
    blocks = re.split(r"\n\n+", done.stdout.strip())
    return [_properties(block) for block in blocks if block]


def _properties(block: str) -> Unit:
    """Return a unit's properties; one that has several lines, as a socket's Listen, keeps them as lines."""
    found: dict[str, str] = {}
    for line in block.splitlines():
        key, _, value = line.partition("=")
        found[key] = f"{found[key]}\n{value}" if key in found else value
    return found


def services(host: Host) -> Findings:
    """What the package enables is enabled and runs, and nothing else of it has failed."""
    found = show(host, ALWAYS)
    if all(unit["LoadState"] == "not-found" for unit in found):
        raise Skipped("the package's units are not installed")
    shut = any(unit["Id"] == SOCKET and _cannot_listen(unit) for unit in found)
    # Without its socket the API cannot be started: one thing to fix, one finding.
    seen = [unit for unit in found if not (shut and unit["Id"] == API and unit["ActiveState"] == "inactive")]
    seen += show(host, _failed_besides(host))
    bad = [finding for unit in seen for finding in _troubles(host, unit, always=True)]
    return bad or ok(f"{len(found)} units enabled and well")


def _failed_besides(host: Host) -> list[str]:
    """Return our other units that failed: a restore, say. Workers have a check of their own."""
    said = host.run(
        ["systemctl", "list-units", "--state=failed", "--plain", "--no-legend", "gpuinfer*"]
    ).stdout
    names = [line.split()[0] for line in said.splitlines() if line.strip()]
    return [name for name in names if name not in ALWAYS and not name.startswith("gpuinfer-worker@")]


def workers(host: Host) -> Findings:
    """Every worker unit runs that was enabled or started; without one, the watcher starts some on demand."""
    names, idle = instances(host), idle_watcher(host)
    if not names:
        return _no_workers(idle)
    # One that the watcher stopped, enabled or not, is as it should be.
    found = [unit for unit in show(host, names) if idle or not _is_stopped(unit)]
    bad = [finding for unit in found for finding in _troubles(host, unit, always=False)]
    running = [unit["Id"] for unit in found if unit["ActiveState"] == "active"]
    return bad or ok(f"{len(running)} of {len(names)} workers run: {', '.join(running) or 'none just now'}")


def _no_workers(idle: str) -> Finding:
    if not idle:
        return ok("no worker is enabled; the watcher starts them when work comes")
    text = f"no worker is enabled, and {idle}: nothing will be computed"
    return warning(text, "systemctl enable --now gpuinfer-worker@0")


def _is_stopped(unit: Unit) -> bool:
    return unit["LoadState"] == "loaded" and unit["ActiveState"] == "inactive"


def idle_watcher(host: Host) -> str:
    """Say why this host's watcher starts no worker; empty when it does. Raises Skipped without systemd."""
    if show(host, [WATCHER])[0].get("ActiveState") != "active":
        return "the watcher does not run"
    if host.settings.watcher.decisions == "log":
        return "the watcher only logs (watcher.decisions)"
    return ""


def instances(host: Host) -> list[str]:
    """Return the worker units that run, failed, or are enabled."""
    host.need_systemd()
    pattern = "gpuinfer-worker@*.service"
    files = host.run(["systemctl", "list-unit-files", "--plain", "--no-legend", pattern]).stdout
    if not files.strip():
        raise Skipped("the package's units are not installed")
    loaded = host.run(["systemctl", "list-units", "--all", "--plain", "--no-legend", pattern]).stdout
    names = {line.split()[0] for text in (files, loaded) for line in text.splitlines() if line.strip()}
    return sorted(name for name in names if not name.endswith("@.service"))


def _troubles(host: Host, unit: Unit, *, always: bool) -> Iterator[Finding]:
    name, state = unit["Id"], unit["ActiveState"]
    if unit["LoadState"] == "masked":
        text = f"{name} is masked: it cannot be started"
        yield error(text, f"systemctl unmask {name}") if always else _note_masked(text, name)
    elif unit["LoadState"] != "loaded":
        yield error(f"{name}: {unit['LoadState']}", f"systemctl daemon-reload; systemd-analyze verify {name}")
    elif _cannot_listen(unit):
        yield _no_listener(unit)
    elif state == "failed":
        yield error(_failure(host, unit), f"systemctl reset-failed {name} && systemctl start {name}")
    elif unit["SubState"] == "auto-restart":
        yield error(f"{name} does not stay up: {_last_line(host, name)}", f"journalctl -u {name} -n 20")
    elif always:
        yield from _not_running(unit)
        yield from _restarted(unit)
    elif state == "inactive" and unit["UnitFileState"] == "enabled":
        yield warning(f"{name} is enabled and does not run", f"systemctl start {name}")
    else:
        yield from _restarted(unit)


def _restarted(unit: Unit) -> Iterator[Finding]:
    """A unit that came back by itself, which is well now; the count goes back with reset-failed."""
    name, times = unit["Id"], int(unit.get("NRestarts") or 0)
    if unit["ActiveState"] == "active" and times > 0:
        look = f"journalctl -u {name} -p warning -n 20; systemctl reset-failed {name}"
        yield warning(f"{name} was restarted {times} times", look)


def _note_masked(text: str, name: str) -> Finding:
    """Masking a worker is how an administrator keeps a GPU for himself."""
    return Finding("ok", f"{text}, as the administrator wants ({name.partition('@')[2].partition('.')[0]})")


def _not_running(unit: Unit) -> Iterator[Finding]:
    name, state = unit["Id"], unit["ActiveState"]
    if unit["UnitFileState"] == "disabled" and state == "inactive":
        yield warning(f"{name} is disabled and does not run", f"systemctl enable --now {name}")
        return
    if unit["UnitFileState"] == "disabled":
        yield warning(f"{name} is not enabled: it will be missing after a reboot", f"systemctl enable {name}")
    # ExecCondition= said no: this host works for another one's Redis, and has none of its own to run.
    if state == "inactive" and unit.get("Result") != "exec-condition":
        yield error(f"{name} does not run", f"systemctl start {name}")


def _cannot_listen(unit: Unit) -> bool:
    return unit["ActiveState"] == "failed" and unit.get("Result") == "resources" and bool(listens(unit))


def _no_listener(unit: Unit) -> Finding:
    """systemd's own words differ, and hardly tell: it is the address, which is taken or of another host."""
    name, (host, port) = unit["Id"], listens(unit) or ("", 0)
    return error(
        f"{name} cannot listen at {host}:{port}: another program does, or the address is not this host's",
        who_listens(port),
    )


def listens(unit: Unit) -> tuple[str, int] | None:
    """Return address and port of a socket unit; None for one without TCP, and for other units."""
    return next(iter(addresses(unit)), None)


def addresses(unit: Unit) -> list[tuple[str, int]]:
    """Return all addresses with their ports of a socket unit."""
    return [(host, int(port)) for host, port in _LISTENS.findall(unit.get("Listen", ""))]


def paths(unit: Unit) -> list[str]:
    """Return the Unix sockets of a socket unit."""
    return _PATHS.findall(unit.get("Listen", ""))


def address(host: Host) -> tuple[str, int]:
    """Return where the API listens: where systemd does it, its socket says; elsewhere the settings do."""
    api = host.settings.api
    try:
        found = listens(show(host, [SOCKET], "Listen")[0])
    except Skipped:
        found = None
    return found or (api.host, api.port)


def who_listens(port: int) -> str:
    """Return what names the program that has our port, and what is to be done about it."""
    return (
        f"ss -ltnp sport = :{port}  # stop that program, or move ours: systemctl edit {SOCKET}; "
        f"then: systemctl start {SOCKET} gpuinfer-api"
    )


def _failure(host: Host, unit: Unit) -> str:
    """Say why a unit failed: systemd's reason, and the last line of trouble in its journal."""
    return f"{unit['Id']} failed ({unit.get('Result', 'unknown')}): {_last_line(host, unit['Id'])}"


def _last_line(host: Host, name: str) -> str:
    """Return the unit's own last error, else its last word, else what systemd says of it.

    ``-u`` alone would find systemd's "Failed to start", which is always the last and tells nothing.
    """
    own = f"_SYSTEMD_UNIT={name}"
    for match in ([own, "-p", "err"], [own], ["-u", name, "-p", "warning"]):
        done = host.run(["journalctl", "-b", *match, "-o", "cat", "-n", "1", "--no-pager", "-q"])
        if done.stdout.strip():
            return done.stdout.strip().splitlines()[-1][:300]
    return "the journal has no line of it"
