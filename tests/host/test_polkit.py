# SPDX-License-Identifier: Apache-2.0
"""What polkit lets the watcher's user do: four verbs on workers' units, start alerts, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import need
from tests.host.container import Answer, Container
from tests.host.root import missing, root

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[2]
RULE = "/usr/share/polkit-1/rules.d/50-gpuinfer-watcher.rules"
UNIT = "[Service]\nType=exec\nExecStart=/bin/sleep infinity\n"
MANAGER = "org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager"


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    need(not missing(), missing())
    with Container(root(), name="polkit") as booted:
        booted.put("/etc/sysusers.d/gpuinfer.conf", (ROOT / "systemd/gpuinfer.sysusers").read_text())
        booted.put(RULE, (ROOT / "systemd/50-gpuinfer-watcher.rules").read_text())
        for name in ("gpuinfer-worker@", "gpuinfer-worker@evil", "gpuinfer-alert@", "other"):
            booted.put(f"/etc/systemd/system/{name}.service", UNIT)
        booted.ok("systemd-sysusers && systemctl daemon-reload && systemctl restart polkit")
        # What is not loaded is refused for another reason.
        booted.ok("systemctl start other gpuinfer-worker@3")
        yield booted


def call(container: Container, method: str, *arguments: str) -> Answer:
    """Call a method of systemd's manager as the watcher does, over D-Bus and without asking anybody."""
    words = " ".join(f"'{word}'" for word in arguments)
    return container.sh(f"runuser -u gpuinfer-watcher -- busctl call -q {MANAGER} {method} {words}")


def test_the_watcher_may_start_stop_restart_and_reset_workers(container: Container) -> None:
    """The four verbs, on any number."""
    for method in ("StartUnit", "RestartUnit", "ResetFailedUnit", "StopUnit"):
        words = (
            ("s", "gpuinfer-worker@3.service")
            if method == "ResetFailedUnit"
            else (*("ss", "gpuinfer-worker@3.service", "replace"),)
        )
        answer = call(container, method, *words)
        assert answer.code == 0, f"{method}: {answer}"
    container.ok("systemctl start gpuinfer-worker@3")


def test_the_watcher_may_start_alerts(container: Container) -> None:
    """By their names, and a stage; nothing but a start."""
    for name in ("dead-letters:began", "no-worker.batch.ocr_2.1-b:ended"):
        answer = call(container, "StartUnit", "ss", f"gpuinfer-alert@{name}.service", "replace")
        assert answer.code == 0, str(answer)


def test_the_watcher_may_look_at_all_units(container: Container) -> None:
    """Reading and listening need no permission."""
    path = "/org/freedesktop/systemd1/unit/gpuinfer_2dworker_403_2eservice"
    words = f"{path} org.freedesktop.DBus.Properties GetAll s org.freedesktop.systemd1.Unit"
    script = f"runuser -u gpuinfer-watcher -- busctl call org.freedesktop.systemd1 {words}"
    assert '"ActiveState"' in container.ok(script)
    assert call(container, "Subscribe").code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("StartUnit", "ss", "gpuinfer-worker@evil.service", "replace"),
        ("StartUnit", "ss", "gpuinfer-worker@007.service", "replace"),
        ("StartUnit", "ss", "gpuinfer-worker@-1.service", "replace"),
        ("StartUnit", "ss", "other.service", "replace"),
        ("StartUnit", "ss", "gpuinfer-alert@dead-letters.service", "replace"),
        ("StartUnit", "ss", "gpuinfer-alert@a:b:began.service", "replace"),
        ("StopUnit", "ss", "gpuinfer-alert@dead-letters:began.service", "replace"),
        ("StopUnit", "ss", "dbus.service", "replace"),
        ("StopUnit", "ss", "gpuinfer-redis.service", "replace"),
        ("ReloadUnit", "ss", "gpuinfer-worker@3.service", "replace"),
        ("KillUnit", "ssi", "gpuinfer-worker@3.service", "all", "9"),
        ("ResetFailedUnit", "s", "other.service"),
        ("SetUnitProperties", "sba(sv)", "gpuinfer-worker@3.service", "true", "0"),
        ("EnableUnitFiles", "asbb", "1", "gpuinfer-worker@3.service", "false", "false"),
        ("MaskUnitFiles", "asbb", "1", "gpuinfer-worker@3.service", "true", "false"),
        ("Reload",),
        ("PowerOff",),
        ("SetEnvironment", "as", "1", "A=b"),
    ],
    ids=" ".join,
)
def test_everything_else_is_refused(container: Container, arguments: tuple[str, ...]) -> None:
    """Other units, other names, other verbs."""
    answer = call(container, *arguments)
    assert answer.code != 0, str(answer)
    assert "denied" in answer.output or "authentication" in answer.output, str(answer)


def test_a_transient_unit_is_refused(container: Container) -> None:
    """The trap: a rule that says yes where polkit knows no unit lets the watcher run anything as root."""
    answer = container.sh(
        "runuser -u gpuinfer-watcher -- systemd-run --no-ask-password --wait touch /was-here"
    )
    assert answer.code != 0
    assert container.sh("test -e /was-here").code != 0


def test_other_users_gain_nothing(container: Container) -> None:
    """The rule is the watcher's alone."""
    script = (
        f"runuser -u gpuinfer-api -- busctl call -q {MANAGER} StartUnit ss gpuinfer-worker@3.service replace"
    )
    assert container.sh(script).code != 0
