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
)
_PROPERTIES = "Id,LoadState,ActiveState,SubState,UnitFileState,Result,NRestarts"

Unit = Mapping[str, str]


def show(host: Host, units: Sequence[str], properties: str = _PROPERTIES) -> list[Unit]:
    """Return the properties of units, in their order. Raises Skipped without systemd."""
    host.need_systemd()
    done = host.run(["systemctl", "show", "-p", properties, *units])
    if done.returncode:
        raise Skipped(f"systemctl: {done.stderr.strip()}")
    blocks = re.split(r"\n\n+", done.stdout.strip())
    return [dict(line.partition("=")[::2] for line in block.splitlines()) for block in blocks if block]


def services(host: Host) -> Findings:
    """What the package enables is enabled and runs."""
    found = show(host, ALWAYS)
    if all(unit["LoadState"] == "not-found" for unit in found):
        raise Skipped("the package's units are not installed")
    ill = [finding for unit in found for finding in _ailments(host, unit, always=True)]
    return ill or ok(f"{len(found)} units enabled and well")


def workers(host: Host) -> Findings:
    """Every worker unit that was enabled or started runs, and there is at least one."""
    names = instances(host)
    if not names:
        return warning(
            "no worker is enabled: nothing will be computed", "systemctl enable --now gpuinfer-worker@0"
        )
    found = show(host, names)
    ill = [finding for unit in found for finding in _ailments(host, unit, always=False)]
    running = [unit["Id"] for unit in found if unit["ActiveState"] == "active"]
    return ill or ok(f"{len(running)} of {len(found)} workers run: {', '.join(running) or 'none just now'}")


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


def _ailments(host: Host, unit: Unit, *, always: bool) -> Iterator[Finding]:
    name, state = unit["Id"], unit["ActiveState"]
    if unit["LoadState"] == "masked":
        text = f"{name} is masked: it cannot be started"
        yield error(text, f"systemctl unmask {name}") if always else _note_masked(text, name)
    elif unit["LoadState"] != "loaded":
        yield error(f"{name}: {unit['LoadState']}", f"systemctl daemon-reload; systemd-analyze verify {name}")
    elif state == "failed":
        yield error(_failure(host, unit), f"systemctl reset-failed {name} && systemctl start {name}")
    elif always and unit["SubState"] == "auto-restart":
        yield error(f"{name} does not stay up: {_last_line(host, name)}", f"journalctl -u {name} -n 20")
    elif always:
        yield from _not_running(unit)
    elif state == "inactive" and unit["UnitFileState"] == "enabled":
        yield warning(f"{name} is enabled and does not run", f"systemctl start {name}")
    elif int(unit.get("NRestarts") or 0) > 0:
        yield warning(
            f"{name} was restarted {unit['NRestarts']} times", f"journalctl -u {name} -p warning -n 20"
        )


def _note_masked(text: str, name: str) -> Finding:
    """Masking a worker is how an administrator keeps a GPU for himself."""
    return Finding("ok", f"{text}, as the administrator wants ({name.partition('@')[2].partition('.')[0]})")


def _not_running(unit: Unit) -> Iterator[Finding]:
    name, state = unit["Id"], unit["ActiveState"]
    if unit["UnitFileState"] == "disabled":
        yield warning(f"{name} is not enabled: it will be missing after a reboot", f"systemctl enable {name}")
    # ExecCondition= said no: this host works for another one's Redis, and has none of its own to run.
    if state == "inactive" and unit.get("Result") != "exec-condition":
        yield error(f"{name} does not run", f"systemctl start {name}")


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
