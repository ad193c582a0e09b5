# SPDX-License-Identifier: Apache-2.0
"""Root's process that is to run a model: it becomes the worker's user, for good, or says why it does not."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gpuinfer import privileges

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
#: Another user stands in for the worker's, which is not on every machine.
NOBODY = """
import ctypes, fcntl, os, pwd, signal, sys, threading
import numpy  # with threads of its own
from gpuinfer import privileges
from gpuinfer.errors import RootKept
nobody = pwd.getpwnam("nobody")
privileges.worker_user = lambda: nobody
privileges.os.access = lambda path, mode: True
"""


def run(script: str) -> str:
    """Run a script in a process of its own, which has a terminal; return what it printed."""
    wrapped = f"import os, pty, sys; code = {NOBODY + textwrap.dedent(script)!r}\n" + textwrap.dedent(
        """
        child, terminal = pty.fork()
        if child == 0:
            os.execv(sys.executable, [sys.executable, "-c", code])
        said = b""
        while True:
            try:
                part = os.read(terminal, 4096)
            except OSError:
                break
            said += part
            if not part:
                break
        _, status = os.waitpid(child, 0)
        sys.stdout.write(said.decode().replace("\\r\\n", "\\n"))
        sys.exit(os.waitstatus_to_exitcode(status))
        """
    )
    # Coverage of who is not root any more could not be written.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(
        [sys.executable, "-c", wrapped],
        env={**kept, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@as_root
def test_there_is_no_way_back() -> None:
    """User, group, groups and capabilities of every thread are another's, and nothing run later gains any."""
    said = run(
        """
        go, hold = threading.Event(), threading.Event()
        thread = threading.Thread(target=lambda: (go.set(), hold.wait()))
        thread.start(); go.wait()
        privileges.leave_root(print)
        assert os.getresuid() == (nobody.pw_uid,) * 3
        assert os.getresgid() == (nobody.pw_gid,) * 3
        assert set(os.getgroups()) <= {nobody.pw_gid}
        for task in os.listdir("/proc/self/task"):
            lines = dict(line.split(":", 1) for line in open(f"/proc/self/task/{task}/status"))
            for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
                assert int(lines[name], 16) == 0, (task, name)
            assert (lines["NoNewPrivs"].strip(), lines["Seccomp"].strip()) == ("1", "2"), task
            assert lines["Uid"].split() == [str(nobody.pw_uid)] * 4
        try:
            os.setuid(0)
        except PermissionError:
            print("gone for good", os.environ["USER"], oct(os.umask(0)))
        hold.set()
        """
    )
    assert said.strip() == "gone for good nobody 0o77"


@as_root
def test_the_terminal_takes_no_input_from_it() -> None:
    """A model cannot type into root's shell; a thread of it neither, nor by the upper half of the number."""
    said = run(
        """
        def type_in(request):
            libc = ctypes.CDLL(None, use_errno=True)
            result = libc.ioctl(0, ctypes.c_ulong(request), b"x")
            return result, ctypes.get_errno()
        privileges.leave_root(print)
        answers = [type_in(0x5412), type_in(0x5412 | 1 << 32), type_in(0x541C)]
        thread = threading.Thread(target=lambda: answers.append(type_in(0x5412)))
        thread.start(); thread.join()
        assert answers == [(-1, 1)] * 4, answers
        assert os.get_terminal_size(0)  # other requests pass
        print("none")
        """
    )
    assert said.strip() == "none"


@as_root
def test_it_still_dies_with_its_parent() -> None:
    """What a watcher starts as a plain process ends with it: the kernel would forget that."""
    said = run(
        """
        libc = ctypes.CDLL(None)
        libc.prctl(1, int(signal.SIGTERM))
        privileges.leave_root(print)
        number = ctypes.c_int(0)
        libc.prctl(2, ctypes.byref(number))
        print(number.value == signal.SIGTERM)
        """
    )
    assert said.strip() == "True"


@as_root
def test_root_that_cannot_be_left_runs_no_model() -> None:
    """Without the capability, or where the user cannot read this very code: an error that says so."""
    said = run(
        """
        def refused(*_): raise PermissionError(1, "Operation not permitted")
        real, privileges.os.setresuid = privileges.os.setresuid, refused
        try:
            privileges.leave_root(print)
        except RootKept as exc:
            print(exc)
        privileges.os.setresuid = real
        privileges.os.access = lambda path, mode: False
        try:
            privileges.leave_root(print)
        except RootKept as exc:
            print(exc)
        """
    )
    first, second = said.strip().splitlines()
    assert first.startswith("cannot become nobody, and model code does not run as root: [Errno 1]")
    assert second.startswith("nobody, who runs model code, cannot read /")


def test_without_that_user_it_goes_on_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, in a checkout; none for who is not root."""
    monkeypatch.setattr(privileges, "worker_user", lambda: None)
    told: list[str] = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    privileges.leave_root(told.append)
    assert told == [
        "model code runs as root: this host has no user gpuinfer-worker, which the package creates"
    ]
    privileges.leave_root(told.append)
    assert len(told) == 1, "once, whoever asks"
    other: list[str] = []
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    privileges.leave_root(other.append)
    assert other == []


def test_the_user_is_the_one_of_the_units() -> None:
    """systemd/ names it once more: for the unit and for sysusers.d."""
    unit = (ROOT / "systemd/gpuinfer-worker@.service").read_text()
    assert f"\nUser={privileges.WORKER_USER}\n" in unit
    assert f"\nu {privileges.WORKER_USER} " in (ROOT / "systemd/gpuinfer.sysusers").read_text()
    assert f"CacheDirectory={privileges.CACHE.relative_to('/var/cache')}\n" in unit
    assert pwd.getpwuid(0).pw_name == "root"
