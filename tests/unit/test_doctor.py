# SPDX-License-Identifier: Apache-2.0
"""The doctor itself: how checks are chosen and run, what is printed, and its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from gpuinfer.doctor import nvml
from gpuinfer.doctor.check import Check, run_all
from gpuinfer.doctor.cli import doctor, line
from gpuinfer.doctor.host import Finding, Findings, Host, Skipped, error, ok, run_command, warning
from gpuinfer.doctor.registry import CHECKS, TOPICS, choose
from gpuinfer.errors import ConfigError, UsageError
from gpuinfer.gpus import Inventory
from gpuinfer.settings import Loaded, Settings
from tests.unit.test_structure import PROGRAMS, STARTERS, imports_of

pytestmark = pytest.mark.unit

HOST = Host(Loaded(Settings(), {}))


def run(*functions: Callable[[Host], Findings], limit_s: float = 5.0) -> list[Finding]:
    checks = [Check(f"t.{number}", function, limit_s) for number, function in enumerate(functions)]
    return [finding for findings in run_all(checks, HOST) for finding in findings]


def test_findings_come_in_order_with_their_checks_name() -> None:
    """Whichever is ready first; a check may have several."""
    gate = threading.Event()

    def first(_: Host) -> Findings:
        gate.wait(60)
        return ok("one")

    def second(_: Host) -> Findings:
        gate.set()
        return [ok("two"), warning("three", "fix")]

    found = run(first, second)
    assert [(finding.check, finding.message) for finding in found] == [
        ("t.0", "one"),
        ("t.1", "two"),
        ("t.1", "three"),
    ]


def test_a_check_that_raises_is_an_error() -> None:
    """With what was raised, and never a traceback; Skipped says why it cannot apply."""

    def broken(_: Host) -> Findings:
        raise ZeroDivisionError("division\nby zero")

    def absent(_: Host) -> Findings:
        raise Skipped("nothing to look at")

    failed, skipped = run(broken, absent)
    assert failed.message == "the check itself failed: ZeroDivisionError: division by zero"
    assert (failed.status, failed.remedy) == ("error", "gpuinfer doctor t.0")
    assert (skipped.status, skipped.message) == ("skipped", "nothing to look at")


def test_a_check_that_hangs_is_left_behind() -> None:
    """Its limit is an error finding, and the others are not held up."""
    never = threading.Event()

    def hangs(_: Host) -> Findings:
        never.wait(60)
        return ok("too late")

    found = run(hangs, lambda _: ok("well"), limit_s=0.05)
    never.set()
    assert found[0].message == "gave no answer in 0.05 s"
    assert [finding.status for finding in found] == ["error", "ok"]


def test_checks_are_chosen_by_name_and_by_topic() -> None:
    """--quick leaves the slow ones out, unless they are named."""
    names = [check.name for check in choose(["redis", "gpu.cuda"], quick=True)]
    assert "redis.reach" in names
    assert "gpu.cuda" in names
    assert "gpu.driver" not in names
    assert not any(check.slow for check in choose(quick=True))
    assert choose() == CHECKS
    with pytest.raises(UsageError, match=r"no check 'redis.reech'; did you mean 'redis.reach'"):
        choose(["redis.reech"])


def test_every_check_has_a_name_and_a_sentence() -> None:
    """Names are unique, topic.name; the sentence is what --list shows."""
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert all(check.name.count(".") == 1 and check.help.endswith(".") for check in CHECKS)


def test_the_doctor_knows_none_of_the_programs() -> None:
    """It looks at them from outside: a broken worker cannot break its doctor."""
    for file in (Path(__file__).parents[2] / "gpuinfer" / "doctor").glob("*.py"):
        rooms = {name.split(".")[1] for name in imports_of(file) if name.startswith("gpuinfer.")}
        assert not rooms & {*PROGRAMS, *STARTERS} - {"cli"}, file


# -- what is printed ------------------------------------------------------------------------


def _found(finding: Finding, _: Host) -> Findings:
    return finding


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str, found: Sequence[Finding] = ()) -> Result:
    checks = tuple(Check(f"t.{number}", partial(_found, f)) for number, f in enumerate(found))
    monkeypatch.setattr("gpuinfer.doctor.cli.choose", lambda *_, **__: checks)
    return CliRunner().invoke(doctor, list(arguments), obj=HOST.loaded, standalone_mode=False)


def test_plain_words_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line a check, the remedy under it, and the count."""
    done = call(monkeypatch, found=[ok("fine"), warning("hm", "fix it")])
    assert done.output.splitlines()[:3] == ["ok      t.0  fine", "warning t.1  hm", "          -> fix it"]
    assert "2 findings: 1 ok, 1 warning (" in done.output


def test_marks_and_colours_on_a_terminal() -> None:
    """✓ ! ✗, and no word that says the same."""
    lines = [line(f, 3, terminal=True) for f in (ok("a"), warning("b", "m"), error("c", "m"))]
    assert [click.unstyle(line)[0] for line in lines] == ["✓", "!", "✗"]
    assert "→ m" in lines[1]
    assert "\x1b[" in lines[0]


@pytest.mark.parametrize(("findings", "code"), [([ok("a"), warning("b", "m")], 0), ([error("c", "m")], 1)])
def test_the_exit_code_tells(monkeypatch: pytest.MonkeyPatch, findings: list[Finding], code: int) -> None:
    """0 with warnings, 1 with an error."""
    assert call(monkeypatch, found=findings).return_value == code
    assert call(monkeypatch, "--json", found=findings).return_value == code


def test_json_holds_all_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else is printed."""
    body = json.loads(call(monkeypatch, "--json", found=[ok("a"), error("c", "m")]).output)
    assert body["ok"] is False
    assert body["summary"] == {"ok": 1, "warning": 0, "error": 1, "skipped": 0}
    assert body["findings"][1] == {"check": "t.1", "status": "error", "message": "c", "remedy": "m"}


def test_the_checks_can_be_listed() -> None:
    """For who wants to choose."""
    done = CliRunner().invoke(doctor, ["--list"], obj=HOST.loaded)
    assert len(done.output.splitlines()) == len(CHECKS)
    assert set(TOPICS) == {line.partition(".")[0] for line in done.output.splitlines()}


# -- what the checks lean on ----------------------------------------------------------------


def test_nvml_is_asked_in_a_child() -> None:
    """The real NVML, present or not, in a process of its own."""
    assert nvml.ask(60).inventory.source in ("nvml", "none")


def test_a_child_sees_all_gpus_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an administrator's shell says: CUDA_VISIBLE_DEVICES would hide GPUs from the probe."""
    for name in ("CUDA_VISIBLE_DEVICES", "GPUINFER_BROKER_PASSWORD", "CREDENTIALS_DIRECTORY"):
        monkeypatch.setenv(name, "0")
    program = tmp_path / "prints-its-environment"
    seen_at = tmp_path / "seen"
    program.write_text(f"#!/bin/sh\nenv >{seen_at}\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    nvml.ask(60)
    seen = seen_at.read_text().splitlines()
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in seen
    assert not [line for line in seen if line.startswith(("CUDA_VISIBLE", "GPUINFER", "CREDENTIALS"))]


def test_a_child_that_hangs_is_killed() -> None:
    """It has no answer ready after a millisecond, which stands for a driver that hangs."""
    found = nvml.ask(0.001).inventory
    assert (found.failed, "NVML gave no answer in 0.001 s" in found.reason) == (True, True)


def test_a_child_that_fails_tells_why() -> None:
    """Its last line, no traceback."""
    found = nvml.ask(60, "gpuinfer.doctor.nonsense").inventory
    assert (found.failed, "No module named" in found.reason) == (True, True)


def test_nvml_is_asked_once() -> None:
    """An answer and a failure alike: a hung driver costs its limit once."""
    asked = []

    def hung() -> nvml.Report:
        asked.append(1)
        return nvml.Report(Inventory(reason="NVML gave no answer", failed=True))

    host = Host(HOST.loaded, nvml=hung)
    for _ in range(3):
        assert host.may_have_gpus()
        with pytest.raises(Skipped, match=r"see gpu\.driver"):
            host.some_gpus()
    assert asked == [1]


def test_wrong_settings_are_one_checks_business() -> None:
    """The others are skipped, with a hint."""

    class Broken(Loaded):
        def __init__(self) -> None: ...

        def __getattr__(self, name: str) -> object:
            raise ConfigError("port must be a number", "/etc/gpuinfer/gpuinfer.toml")

    with pytest.raises(Skipped, match=r"see config\.file"):
        _ = Host(Broken()).settings


def test_a_command_that_is_not_installed_is_skipped() -> None:
    """And one that fails is its caller's business."""
    with pytest.raises(Skipped, match="no-such-command is not installed"):
        run_command(["no-such-command"])
    done: subprocess.CompletedProcess[str] = run_command(["false"])
    assert done.returncode == 1
