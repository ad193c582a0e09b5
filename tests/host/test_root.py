# SPDX-License-Identifier: Apache-2.0
"""Root's own commands on an installed host: what runs a model is not root, whoever has called it."""

from __future__ import annotations

import json

import pytest

from tests.host.admin import predict, ready, result
from tests.host.container import Container
from tests.models_for_tests import signer

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

SIGNED = "/tmp/signed"
#: A model that tells who runs it, whether it may write to the system, and whether it sees the host's /tmp.
WHO = """
import os, pwd

class Who:
    example = 1

    def predict(self, batch: list[int]) -> list[list]:
        try:
            open("/etc/who", "w").close()
        except OSError:
            wrote = False
        else:
            wrote = True
        return [[pwd.getpwuid(os.getuid()).pw_name, wrote, os.path.exists("/tmp/outside")] for _ in batch]
"""
#: Tell whether a process has a password in its memory.
LOOK = """
import sys
process, user = sys.argv[1:]
secret = open(f"/etc/gpuinfer/credentials/{user}", "rb").read().strip()
found = False
with open(f"/proc/{process}/mem", "rb", 0) as memory:
    for line in open(f"/proc/{process}/maps"):
        place, rights = line.split()[:2]
        first, last = (int(part, 16) for part in place.split("-"))
        if rights.startswith("rw"):
            memory.seek(first)
            found |= secret in memory.read(last - first)
print(found)
"""


@pytest.fixture(scope="module", autouse=True)
def model(host: Container, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A model that leaves a file wherever it runs, installed as an administrator does."""
    host.copy(signer(tmp_path_factory.mktemp("models") / "signer", SIGNED), "/root/")
    host.ok("gpuinfer model add /root/signer")
    host.ok("systemctl stop gpuinfer-watcher; echo 1.5 >/root/one.json; chmod 600 /root/one.json")


def owner(host: Container) -> str:
    """Return who has run the model, and forget it."""
    return host.ok(f"stat -c %U {SIGNED}; rm {SIGNED}").strip()


def served_by(host: Container, unit: str) -> str:
    """Wait until a unit's worker is ready; return the worker that has run a task then."""
    ready(host, unit)
    done = result(host, predict(host, '{"inputs": 1.5, "model": "signer"}'))
    assert done["status"] == "completed", done
    return str(done["worker"])


def passwords_in(host: Container, unit: str) -> dict[str, str]:
    """Tell which passwords a unit's process has in its memory."""
    pid = host.ok(f"systemctl show -P MainPID {unit}").strip()
    host.put("/root/look.py", LOOK)
    return {name: host.ok(f"python3.11 /root/look.py {pid} {name}").strip() for name in ("worker", "admin")}


def test_model_add_runs_it_as_a_worker_would(host: Container) -> None:
    """In the worker unit's sandbox and as its user: a read-only system, a /tmp of its own.

    One that fails is not added, and the error has file and line.
    """
    host.put("/root/who.py", WHO)
    host.ok("touch /tmp/outside; chmod 600 /root/who.py")
    said = json.loads(host.ok("gpuinfer model add /root/who.py --json"))
    assert said["tried"]["result"]["output"] == ["gpuinfer-worker", False, False]
    assert said["tried"]["device"] == "cpu"
    listed = json.loads(host.ok("gpuinfer model list --json"))
    assert "who" in {entry["name"] for entry in listed}
    host.ok("cp -r /var/lib/gpuinfer/models/who /var/lib/gpuinfer/models/gone")
    # It is dropped from the catalogue, too, which the worker, whom root is in the other commands, may not.
    assert "gone is not in the fleet's catalogue" in host.ok("gpuinfer model remove gone")
    host.put("/root/bad.py", WHO.replace("example = 1", "example = 1 / 0"))
    failed = host.sh("gpuinfer model add /root/bad.py")
    assert failed.code == 65, failed
    assert "division by zero (bad.py, line 5)" in failed.output
    left = host.ok("ls -A /var/lib/gpuinfer/models").split()
    assert "who" in left and not [name for name in left if name == "bad" or name.startswith(".")]


def test_model_run(host: Container) -> None:
    """`gpuinfer model run` reads root's file, and runs the model as the worker's user."""
    said = json.loads(host.ok("cd / && gpuinfer model run signer --input /root/one.json --json"))
    assert said["results"] == [{"outputs": {"y": 1.5}}]
    assert owner(host) == "gpuinfer-worker"


def test_a_worker_by_hand(host: Container) -> None:
    """`gpuinfer worker N` serves, as the worker's user and with the worker's password alone."""
    unit = "-p Environment=GPUINFER_WORKER_MODELS=signer -p Environment=GPUINFER_WORKER_DEVICE=cpu"
    host.ok(f"systemd-run -q --unit=by-hand {unit} gpuinfer worker 7")
    assert served_by(host, "by-hand") == "gpu7@gpuhost"
    assert owner(host) == "gpuinfer-worker"
    assert passwords_in(host, "by-hand") == {"worker": "True", "admin": "False"}
    host.ok("systemctl stop by-hand")


def test_celerys_own_worker(host: Container) -> None:
    """`gpuinfer celery worker` takes the same way in, and serves; it has no password but the worker's."""
    unit = "-p Environment=GPUINFER_WORKER_MODELS=signer -p Environment=GPUINFER_WORKER_DEVICE=cpu"
    host.ok(f"systemd-run -q --unit=by-celery {unit} gpuinfer celery worker -P solo -n gpu8@gpuhost")
    assert served_by(host, "by-celery") == "gpu8@gpuhost"
    assert owner(host) == "gpuinfer-worker"
    assert passwords_in(host, "by-celery") == {"worker": "True", "admin": "False"}
    host.ok("systemctl stop by-celery")


def test_the_demo(host: Container) -> None:
    """All of `gpuinfer demo` is the worker's user: its workers, and the model called directly."""
    host.ok("systemd-run -q --unit=demo gpuinfer demo --keep --workers 1 --rounds 1")
    host.until("journalctl -u demo -o cat | grep -q 'shipped model\\|realtime'", timeout=180, what="the demo")
    shown = [line.split(maxsplit=1) for line in host.ok("ps -eo user:32=,args=").splitlines()]
    demo = {user for user, what in shown if "gpuinfer demo" in what or "gpuinfer worker 0" in what}
    assert demo == {"gpuinfer-worker"}, shown
    host.ok("systemctl stop demo")
