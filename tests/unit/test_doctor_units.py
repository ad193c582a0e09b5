# SPDX-License-Identifier: Apache-2.0
"""The doctor, the units and who listens: a systemctl that says what the test wants."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from threading import Thread

import pytest

from gpuinfer.doctor import units, work
from gpuinfer.doctor.host import Finding, Host, Skipped
from gpuinfer.journal.last_words import last_words
from gpuinfer.settings import Loaded, Settings
from tests.unit.test_doctor_host import flat, host, one

pytestmark = pytest.mark.unit


def unit(name: str, **changes: str) -> str:
    sound = {"Id": name, "LoadState": "loaded", "ActiveState": "active", "SubState": "running"}
    sound |= {"UnitFileState": "enabled", "Result": "success", "NRestarts": "0", **changes}
    if name.endswith(".target"):
        del sound["Result"], sound["NRestarts"]  # these are of services
    return "\n".join(f"{key}={value}" for key, value in sound.items())


WATCHES = unit("gpuinfer-watcher.service")
#: Of a unit whose main process ended with an exit status.
FAILED = {"Result": "exit-code", "ExecMainCode": "1"}
TEMPLATE = "gpuinfer-worker@.service disabled enabled\n"


def systemd(
    root: Path,
    *shown: str,
    files: str = "",
    journal: str = "",
    **sections: object,
) -> Host:
    """Return a host whose systemctl answers so; of what is shown with the units that it is asked for."""

    def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        key = command[1] if command[0] == "systemctl" else "journal"
        names = [block.partition("\n")[0].removeprefix("Id=") for block in shown]
        asked = [any(fnmatch(name, word) for word in command) for name in names]
        named = [block for block, wanted in zip(shown, asked, strict=True) if wanted]
        answers = {"show": "\n\n".join(named), "list-unit-files": files, "journal": journal}
        return subprocess.CompletedProcess(list(command), 0, answers[key] + "\n", "")

    (root / "run/systemd/system").mkdir(parents=True, exist_ok=True)
    return Host(Loaded(Settings.model_validate(sections), {}), root=root, run=run)


def test_without_systemd_units_are_skipped(tmp_path: Path) -> None:
    """A container, a laptop, a checkout."""
    with pytest.raises(Skipped, match="does not run systemd"):
        units.services(host(tmp_path))


def test_without_the_package_units_are_skipped(tmp_path: Path) -> None:
    """systemd is there, our units are not."""
    shown = [unit(name, LoadState="not-found", ActiveState="inactive") for name in units.ALWAYS]
    for check in (units.services, units.workers):
        with pytest.raises(Skipped, match="units are not installed"):
            check(systemd(tmp_path, *shown))


def test_units_that_run(tmp_path: Path) -> None:
    """All of them; Redis need not where broker.url names another host's."""
    shown = [unit(name) for name in units.ALWAYS]
    shown[1] = unit("gpuinfer-redis.service", ActiveState="inactive", Result="exec-condition")
    here = systemd(tmp_path, *shown)
    assert one(units.services(here)).message == "6 units enabled and running"


def test_units_that_do_not(tmp_path: Path) -> None:
    """Failed with the journal's last word, masked, disabled, stopped: each with the one command."""
    shown = [
        unit("gpuinfer.target", ActiveState="inactive"),
        unit("gpuinfer-redis.service", ActiveState="failed", Result="exit-code"),
        unit("gpuinfer-api.socket", LoadState="masked", ActiveState="inactive"),
        unit("gpuinfer-api.service", UnitFileState="disabled"),
        unit("gpuinfer-watcher.service", LoadState="bad-setting", ActiveState="inactive"),
        unit("gpuinfer-workers.target", UnitFileState="disabled", ActiveState="inactive"),
    ]
    found = flat(units.services(systemd(tmp_path, *shown, journal="Starting\nFatal: no memory")))
    assert [finding.remedy for finding in found] == [
        "systemctl start gpuinfer.target",
        "systemctl reset-failed gpuinfer-redis.service && systemctl start gpuinfer-redis.service",
        "systemctl unmask gpuinfer-api.socket",
        "systemctl enable gpuinfer-api.service",
        "systemctl daemon-reload; systemd-analyze verify gpuinfer-watcher.service",
        "systemctl enable --now gpuinfer-workers.target",
    ]
    assert found[1].message == "gpuinfer-redis.service failed (exit-code): Fatal: no memory"


def test_any_other_unit_that_failed(tmp_path: Path) -> None:
    """A restore that failed leaves tasks in flight; of a worker its own check tells."""
    restore = unit(
        "gpuinfer-restore@0.service", ActiveState="failed", Result="exit-code", UnitFileState="static"
    )
    worker = unit("gpuinfer-worker@0.service", ActiveState="failed")
    shown = [unit(name) for name in units.ALWAYS]
    here = systemd(tmp_path, *shown, restore, worker, journal="no such password")
    found = one(units.services(here))
    assert (found.status, found.message) == (
        "error",
        "gpuinfer-restore@0.service failed (exit-code): no such password",
    )


def test_a_service_that_came_back_by_itself(tmp_path: Path) -> None:
    """It runs, and somebody should know how often it did not."""
    shown = [unit(name) for name in units.ALWAYS]
    shown[3] = unit(units.API, NRestarts="4")
    found = one(units.services(systemd(tmp_path, *shown)))
    assert (found.status, found.message) == ("warning", f"{units.API} was restarted 4 times")
    shown[3] = unit(units.API, NRestarts="1")
    assert one(units.services(systemd(tmp_path, *shown))).message == f"{units.API} was restarted 1 time"


def test_a_unit_that_does_not_stay_up(tmp_path: Path) -> None:
    """Between two of its starts it is neither running nor failed, and not well."""
    shown = [unit(name) for name in units.ALWAYS]
    shown[3] = unit("gpuinfer-api.service", ActiveState="activating", SubState="auto-restart", **FAILED)
    found = one(units.services(systemd(tmp_path, *shown, journal="Fatal: no memory")))
    assert (found.status, found.message) == (
        "error",
        "gpuinfer-api.service does not stay up (exit-code): Fatal: no memory",
    )


def test_a_worker_in_a_crash_loop(tmp_path: Path) -> None:
    """It is no sound worker that starts just now."""
    name = "gpuinfer-worker@0.service"
    looping = unit(name, ActiveState="activating", SubState="auto-restart", **FAILED)
    here = systemd(tmp_path, looping, WATCHES, files=TEMPLATE, journal="it ended with 74")
    found = one(units.workers(here))
    assert (found.status, found.message) == (
        "error",
        f"{name} does not stay up (exit-code): it ended with 74",
    )


class Journal:
    """A journalctl that has lines of several starts of a unit, as (start, priority, text)."""

    def __init__(self, *lines: tuple[str, str, str]) -> None:
        self.lines = lines

    def __call__(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        starts = [word.partition("=")[2] for word in command if word.startswith("_SYSTEMD_INVOCATION_ID=")]
        wanted = command[command.index("-p") + 1] if "-p" in command else ""
        found = [text for start, level, text in self.lines if [start] == starts and wanted in ("", level)]
        return subprocess.CompletedProcess(list(command), 0, "".join(f"{text}\n" for text in found[-1:]), "")


def test_only_the_last_start_has_the_cause() -> None:
    """An error of an earlier start is fixed since; of what was killed, the signal is the cause."""
    earlier = ("one", "err", "model not loaded")
    ready = ("two", "info", "ready")
    unit = {"Id": "gpuinfer-worker@0.service", "InvocationID": "two", "Result": "signal"}
    killed = {**unit, "ExecMainCode": "2", "ExecMainStatus": "9"}
    assert last_words(Journal(earlier, ready), killed) == "(signal): killed by SIGKILL"
    lost = ("two", "err", "the GPU is lost")
    assert last_words(Journal(earlier, lost, ready), killed) == (
        "(signal): killed by SIGKILL; the GPU is lost"
    )
    ended = {**unit, **FAILED, "ExecMainStatus": "1"}
    assert last_words(Journal(earlier, ready), ended) == "(exit-code): ready"
    assert last_words(Journal(earlier), ended) == "(exit-code): the journal has no line of it"


def test_wrong_settings_are_mended_before_a_start(tmp_path: Path) -> None:
    """Exit status 78: another start would end so, too. A worker has a file of its own."""
    start = "systemctl reset-failed {0} && systemctl start {0}"
    for name, first in (
        ("gpuinfer-worker@3.service", "editor /etc/gpuinfer/worker@3.env && gpuinfer config check && "),
        (units.API, "gpuinfer config check && "),
    ):
        shown = [unit(one) for one in units.ALWAYS if one != name]
        for status, fix in (("78", first), ("1", "")):
            failed = unit(name, ActiveState="failed", ExecMainStatus=status, **FAILED)
            here = systemd(tmp_path, *shown, failed, files=TEMPLATE, journal="port: must be a number")
            check = units.workers if "worker" in name else units.services
            assert one(check(here)).remedy == fix + start.format(name)


def test_a_port_that_another_program_has(tmp_path: Path) -> None:
    """The command names that program: to start our socket once more would fix nothing."""
    shown = [unit(name) for name in units.ALWAYS]
    shown[2] = unit(units.SOCKET, ActiveState="failed", Result="resources", Listen="127.0.0.1:9090 (Stream)")
    shown[3] = unit(units.API, ActiveState="inactive")
    found = one(units.services(systemd(tmp_path, *shown)))
    assert found.message.startswith(f"{units.SOCKET} cannot listen at 127.0.0.1:9090: another program does")
    assert found.remedy.startswith("ss -ltnp sport = :9090  # ")


def test_another_program_that_answers_for_the_api(tmp_path: Path) -> None:
    """Even where it calls itself ready."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        listen = f"127.0.0.1:{port} (Stream)"
        shown = unit(units.SOCKET, ActiveState="failed", Result="resources", Listen=listen)
        asked = Thread(target=_answer, args=(stranger,))
        asked.start()
        found = one(work.ready(systemd(tmp_path, shown)))
        asked.join()
    assert found.message == f"what answers at 127.0.0.1:{port} is another program, which has our port"
    assert found.remedy.startswith(f"ss -ltnp sport = :{port}")


def _answer(server: socket.socket, status: str = "200 OK", text: str = "", times: int = 1) -> None:
    for _ in range(times):
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())


def test_an_api_whose_certificate_is_wrong(tmp_path: Path) -> None:
    """It answers without TLS, and says why; a restart would not help."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        here = systemd(tmp_path, unit(units.SOCKET), api={"port": port, "tls_cert": "/etc/none.pem"})
        text = '{"error": {"message": "api.tls_cert: there is no /etc/none.pem"}}'
        Thread(target=_answer, args=(server, "503 Service Unavailable", text, 2), daemon=True).start()
        found = one(work.ready(here))
    told = "answers without TLS, though api.tls_cert is set: api.tls_cert: there is no /etc/none.pem"
    assert (found.status, found.remedy) == ("error", "gpuinfer config check")
    assert found.message == f"the API at 127.0.0.1:{port} {told}"


@pytest.mark.parametrize(
    ("listens", "address"),
    [
        ("0.0.0.0:9090 (Stream)", ("0.0.0.0", 9090)),
        ("[::1]:8081 (Stream)", ("::1", 8081)),
        ("", ("127.0.0.1", 8080)),
    ],
)
def test_the_api_is_asked_where_its_socket_listens(
    tmp_path: Path, listens: str, address: tuple[str, int]
) -> None:
    """An administrator's drop-in moves the socket; the settings are for an API without one."""
    assert units.address(systemd(tmp_path, unit(units.SOCKET, Listen=listens))) == address


def test_workers(tmp_path: Path) -> None:
    """A masked one is as the administrator wants; a failed one is an error."""
    names = [f"gpuinfer-worker@{number}.service" for number in range(3)]
    shown = [
        WATCHES,
        unit(names[0]),
        unit(names[1], ActiveState="failed", Result="watchdog"),
        unit(names[2], LoadState="masked", ActiveState="inactive"),
    ]
    found = flat(units.workers(systemd(tmp_path, *shown, files=TEMPLATE)))
    assert [finding.status for finding in found] == ["error", "ok"]
    assert "gpuinfer-worker@1.service failed (watchdog)" in found[0].message
    sound = one(units.workers(systemd(tmp_path, *shown[:2], files=TEMPLATE)))
    assert sound.message == "1 of 1 workers run: gpuinfer-worker@0.service"


@pytest.mark.parametrize(
    ("watcher", "decisions", "why"),
    [
        (WATCHES, "act", ""),
        (WATCHES, "log", "the watcher only logs (watcher.decisions)"),
        (unit(units.WATCHER, ActiveState="inactive"), "act", "the watcher does not run"),
    ],
)
def test_without_a_worker(tmp_path: Path, watcher: str, decisions: str, why: str) -> None:
    """A watcher that acts starts one on demand: only without it nothing is ever computed."""
    here = systemd(tmp_path, watcher, files=TEMPLATE, watcher={"decisions": decisions})
    start = "systemctl enable --now gpuinfer-worker@0"
    found = one(units.workers(here))
    if why:
        text = f"no worker is enabled, and {why}: nothing will be computed"
        assert found == Finding("warning", text, start)
    else:
        assert found == Finding("ok", "no worker is enabled; the watcher starts them when work comes")


def test_a_worker_that_was_stopped(tmp_path: Path) -> None:
    """Enabled or restarted once, it is at rest: the watcher stops who is not needed."""
    name = "gpuinfer-worker@0.service"
    rests = unit(name, ActiveState="inactive", NRestarts="3", UnitFileState="disabled")
    enabled = unit(name, ActiveState="inactive")
    off = unit(units.WATCHER, ActiveState="inactive")
    for shown, status in (
        ((WATCHES, rests), "ok"),
        ((WATCHES, enabled), "ok"),
        ((off, rests), "ok"),
        ((off, enabled), "warning"),
        ((off, unit(name, NRestarts="3")), "warning"),
    ):
        assert one(units.workers(systemd(tmp_path, *shown, files=TEMPLATE))).status == status
