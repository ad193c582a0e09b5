# SPDX-License-Identifier: Apache-2.0
"""A host right after ``apt install``: what runs, who owns what, how tight the units are."""

from __future__ import annotations

import json

import pytest

from tests.env_files import TEXTS
from tests.host.admin import TWO, journal, main_pid, predict, properties, result, start_worker
from tests.host.conftest import ROOT
from tests.host.container import Answer, Container

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

SERVICES = ("redis", "api", "watcher", "worker@0", "restore@0", "alert@x", "flower", "roll")
#: It loads a module and makes nodes in /dev, as root: what that takes is left to it.
LOOSER = {"devices": 1.7}


@pytest.mark.parametrize(
    "unit", ["gpuinfer.target", "gpuinfer-redis", "gpuinfer-api.socket", "gpuinfer-api", "gpuinfer-watcher"]
)
def test_services_run_and_come_back_at_boot(host: Container, unit: str) -> None:
    """What needs no GPU is enabled and running without a further command (the host was booted since)."""
    host.until(f"systemctl is-active {unit}", what=unit)
    host.ok(f"systemctl is-enabled {unit}")


def test_flower_is_there_and_off(host: Container) -> None:
    """Flower is shipped, and neither enabled nor running."""
    assert properties(host, "gpuinfer-flower", "LoadState", "ActiveState", "UnitFileState") == {
        "LoadState": "loaded",
        "ActiveState": "inactive",
        "UnitFileState": "disabled",
    }


def test_flower_sees_the_workers_on_loopback(host: Container) -> None:
    """Started, it answers on 127.0.0.1:5555, and nowhere else, to who has its password; status says so."""
    assert "Flower" not in host.sh("gpuinfer status").output
    host.ok("systemctl start gpuinfer-flower")
    login = "-u admin:$(cat /etc/gpuinfer/credentials/flower)"
    host.until(f"curl -sf -o /dev/null {login} http://127.0.0.1:5555/workers", what="Flower")
    for path in ("workers", "tasks", "broker", "api/workers"):
        assert host.ok(f"curl -s -o /dev/null -w '%{{http_code}}' http://127.0.0.1:5555/{path}") == "401"
    assert "127.0.0.1:5555" in host.ok("ss -Hltn sport = :5555")
    for command in ("status", "doctor access.connect"):
        said = " ".join(host.sh(f"gpuinfer {command}").output.split())
        assert "Flower http://127.0.0.1:5555: this host, as admin" in said, said
    host.ok("systemctl stop gpuinfer-flower")
    told = journal(host, "_SYSTEMD_UNIT=gpuinfer-flower.service")
    assert {"6"} == {line["PRIORITY"] for line in told if line.get("LOGGER") == "flower.command"}


def test_the_gpus_nodes_are_made_at_boot(host: Container) -> None:
    """Its unit, in its sandbox, calls nvidia-modprobe for the control device and for unified memory apart."""
    host.put("/usr/bin/nvidia-modprobe", '#!/bin/sh\necho "$@" >>/dev/nvidia-calls\n', 0o755)
    host.ok("systemctl restart gpuinfer-devices")
    assert host.ok("cat /dev/nvidia-calls").splitlines() == ["-c 255", "-u -c 0"]
    # Again at each start of a worker: the driver may have come, or failed, since.
    for count in (4, 6):
        host.ok("systemctl restart gpuinfer-worker@0")
        assert len(host.ok("cat /dev/nvidia-calls").splitlines()) == count
    host.ok("rm /dev/nvidia-calls /usr/bin/nvidia-modprobe; systemctl stop gpuinfer-worker@0")


def test_torch_for_cpus_beside_nvidias_driver(host: Container) -> None:
    """postinst, doctor and a worker, which ends with 69, name the one command that swaps torch."""
    host.ok("mkdir -p /root/driver/nvidia && echo 570 >/root/driver/nvidia/version")
    host.ok("mount --bind /root/driver /proc/driver")
    command = "apt install gpuinfer-torch-cuda"
    try:
        assert command in host.ok("dpkg-reconfigure gpuinfer 2>&1")
        assert command in host.sh("gpuinfer doctor versions.torch").output
        # Not as a unit: its own /proc has no file that was put there by a mount.
        worker = host.sh("timeout 120 gpuinfer worker 5 2>&1")
        assert (worker.code, command in worker.output) == (69, True), worker.output
    finally:
        host.ok("umount /proc/driver")


def test_units_are_verified_and_tight(host: Container) -> None:
    """systemd-analyze finds nothing to say about the units, and at most 1.5 of exposure in each."""
    assert host.ok("systemd-analyze verify /lib/systemd/system/gpuinfer*").strip() == ""
    for service in (*SERVICES, *LOOSER):
        said = host.ok(f"systemd-analyze security --no-pager gpuinfer-{service}.service | tail -n 1")
        assert float(said.split(":")[1].split()[0]) <= LOOSER.get(service, 1.5), said


def test_each_program_has_a_user_of_its_own(host: Container) -> None:
    """Nothing long-lived of ours runs as root, and no two programs as one user."""
    users = {
        name: properties(host, f"gpuinfer-{name}", "User")["User"] for name in ("redis", "api", "watcher")
    }
    users["worker"] = properties(host, "gpuinfer-worker@0", "User")["User"]
    assert users == {name: f"gpuinfer-{name}" for name in users}


def test_passwords_are_roots_alone(host: Container) -> None:
    """The credentials are files that only root can read, each another one."""
    said = host.ok("stat -c '%a %U %n' /etc/gpuinfer/credentials /etc/gpuinfer/credentials/*")
    lines = [line.split() for line in said.splitlines()]
    assert lines[0][:2] == ["700", "root"]
    assert [line[:2] for line in lines[1:]] == [["600", "root"]] * 5
    assert int(host.ok("cat /etc/gpuinfer/credentials/* | fold -w 64 | sort -u | wc -l")) == 5
    assert host.sh("setpriv --reuid gpuinfer-worker --clear-groups cat /etc/gpuinfer/credentials/worker").code


def test_passwords_are_in_no_command_line_and_no_variable(host: Container) -> None:
    """Whoever lists processes or units sees no password."""
    host.ok(
        "for file in /etc/gpuinfer/credentials/*; do"
        " ! grep -qarf $file /proc/[0-9]*/cmdline /proc/[0-9]*/environ /run/gpuinfer 2>/dev/null || exit 1;"
        " ! systemctl show '*' | grep -qf $file || exit 1; done"
    )


def test_the_hosts_own_redis_is_not_touched(host: Container) -> None:
    """Debian's instance on 6379 goes on, empty; ours listens on a socket alone."""
    assert host.ok("redis-cli -p 6379 dbsize").strip() == "0"
    listening = host.ok("ss -Hltnp")
    assert "6379" in listening
    ours = properties(host, "gpuinfer-redis", "MainPID")["MainPID"]
    assert f"pid={ours}," not in listening


def test_redis_is_tuned_and_answers_nobody_without_a_password(host: Container) -> None:
    """maxmemory follows the host's RAM, results alone can be evicted, and strangers are refused."""
    cli = "redis-cli -s /run/gpuinfer/redis/redis.sock"
    assert "NOAUTH" in host.sh(f"{cli} dbsize").output
    admin = f"REDISCLI_AUTH=$(cat /etc/gpuinfer/credentials/admin) {cli} --user admin"
    assert host.ok(f"{admin} config get maxmemory-policy").split()[1] == "volatile-ttl"
    assert host.ok(f"{admin} config get appendonly").split()[1] == "yes"
    wanted = next(
        line.split()[1]
        for line in host.ok("gpuinfer redis show").splitlines()
        if line.startswith("maxmemory ")
    )
    assert int(host.ok(f"{admin} config get maxmemory").split()[1]) == int(wanted.removesuffix("mb")) * 2**20


def test_an_environment_file_is_what_systemd_makes_of_it(host: Container) -> None:
    """Our reader and systemd make the same of each text."""
    names = sorted({name for found in TEXTS.values() for name in found})
    script = ""
    for number, text in enumerate(TEXTS):
        host.put(f"/root/env/{number}.env", text)
        script += f"systemd-run -q --wait --pipe -p EnvironmentFile=/root/env/{number}.env env -0; echo\n"
    # An empty line ends what one of them said: no variable here has two line ends in a row.
    told = host.ok(script).split("\0\n")[: len(TEXTS)]
    for text, said in zip(TEXTS, told, strict=True):
        every = dict(line.split("=", 1) for line in said.split("\0") if "=" in line)
        assert {name: every[name] for name in names if name in every} == TEXTS[text], text


def test_an_untouched_installation_has_changed_nothing(host: Container) -> None:
    """Nor does anything do nothing, or wait for a restart; what is changed is told with its unit."""
    check = json.loads(host.ok("gpuinfer config check --json"))
    assert check == {"ok": True, "changed": 0, "workers": {}, "warnings": [], "restart": []}
    named = host.ok("gpuinfer --config /etc/gpuinfer/gpuinfer.toml queue status")
    assert "realtime" in named
    host.ok("cp -p /etc/gpuinfer/gpuinfer.toml /root")
    host.ok("sed -i 's/^#max_wait_s = .*/max_wait_s = 30/' /etc/gpuinfer/gpuinfer.toml")
    assert json.loads(host.ok("gpuinfer config check --json"))["restart"] == ["gpuinfer-api"]
    host.ok("systemctl restart gpuinfer-api")
    assert json.loads(host.ok("gpuinfer config check --json"))["restart"] == []


def test_a_slip_in_the_settings_takes_no_queue_down(host: Container) -> None:
    """Redis starts as it did last, and says why; a dotted key names another Redis, too."""
    file = "/etc/gpuinfer/gpuinfer.toml"
    host.ok(f"echo '[api' >>{file}; systemctl restart gpuinfer-redis")
    told = host.ok("journalctl --sync; journalctl -u gpuinfer-redis -p warning -o cat")
    assert f"gpuinfer: warning: {file}: is not valid TOML" in told
    host.ok(f"echo 'broker.url = \"rediss://queue.example:6380/0\"' >{file}")
    host.ok("systemctl restart gpuinfer-redis; ! systemctl is-active gpuinfer-redis")
    host.ok(f"echo '[api' >>{file}; systemctl restart gpuinfer-redis; ! systemctl is-active gpuinfer-redis")
    host.ok(f"cp -p /root/gpuinfer.toml {file}; systemctl restart gpuinfer-redis gpuinfer-api")


def as_user(host: Container, user: str, command: str) -> Answer:
    return host.sh(f"runuser -u {user} -- {command}")


def test_who_is_not_root_has_a_way(host: Container) -> None:
    """Members of two groups just call the commands; who has no right is told which, and who has it."""
    host.ok("systemctl stop gpuinfer-watcher")  # it would start a worker for what is submitted
    host.ok("useradd -G gpuinfer-operator alice; useradd -G gpuinfer-viewer bob; useradd carol")
    task_id = as_user(host, "alice", f"gpuinfer submit '{TWO}'").output.strip()
    for command in (
        "queue status",
        f"cancel {task_id}",
        f"result {task_id}",
        "queue pause batch",
        "dead list",
    ):
        answer = as_user(host, "alice", f"gpuinfer {command}")
        assert "lacks" not in answer.output, answer
        assert answer.code == 0 or command.startswith("result"), answer
    assert as_user(host, "alice", "gpuinfer queue resume batch").code == 0
    assert as_user(host, "bob", "gpuinfer queue status").code == 0
    refused = as_user(host, "bob", f"gpuinfer result {task_id}")
    assert refused.code == 77
    assert "the Redis user viewer lacks the right to" in refused.output
    stranger = as_user(host, "carol", "gpuinfer queue status")
    assert stranger.code == 69
    assert "the user carol may not open Redis's socket; on Redis's own host root" in stranger.output
    for user, file in (("carol", "/etc/gpuinfer/logins/viewer"), ("bob", "/etc/gpuinfer/logins/operator")):
        assert as_user(host, user, f"cat {file}").code
    for file in (
        "/run/gpuinfer/redis/users.acl",
        "/etc/gpuinfer/redis-users.acl",
        "/etc/gpuinfer/credentials",
    ):
        assert as_user(host, "alice", f"cat {file}").code
    assert host.ok("stat -c %a /etc/gpuinfer/redis-users.acl").strip() == "640"
    host.ok("systemctl start gpuinfer-watcher")


def test_passwords_are_changed_while_all_goes_on(host: Container) -> None:
    """By the command, and by dpkg-reconfigure where one is missing: what runs knows the new one."""
    before = host.ok("cat /etc/gpuinfer/credentials/api")
    said = host.ok("gpuinfer redis rotate-password api")
    assert said.splitlines()[0] == "restarting gpuinfer-api.service"
    assert said.splitlines()[1] == "api has a new password, 1 old one is forgotten"
    assert host.ok("cat /etc/gpuinfer/credentials/api") != before
    for user in ("admin", "operator"):
        host.ok(f"gpuinfer redis rotate-password {user}")
    assert as_user(host, "alice", "gpuinfer queue status").code == 0
    _rotate_workers(host)
    host.ok("rm /etc/gpuinfer/credentials/api; dpkg-reconfigure gpuinfer")
    host.until("journalctl -b -u gpuinfer-roll | grep -q 'done: new passwords'")
    host.until("curl -sf http://127.0.0.1:8080/health/live")
    host.ok("systemctl restart gpuinfer-redis; gpuinfer queue status")
    assert result(host, predict(host))["status"] == "completed"
    assert host.ok("stat -c '%a %U' /etc/gpuinfer/credentials/* | sort -u").strip() == "600 root"


def _rotate_workers(host: Container) -> None:
    """Two workers get a new password by the roll's unit, one after the other."""
    units = ("gpuinfer-worker@0.service", "gpuinfer-worker@1.service")
    for number in (0, 1):
        start_worker(host, number)
    before = {unit: main_pid(host, unit) for unit in units}
    said = host.ok("gpuinfer redis rotate-password worker --json 2>/dev/null", timeout=300)
    done = json.loads(said)
    assert (done["complete"], done["restarted"], done["forgotten"]) == (True, list(units), 1)
    told = host.ok("journalctl --sync; journalctl -b -u gpuinfer-roll -o cat")
    assert [line for line in told.splitlines() if "new password of worker" in line] == [
        *(f"restarting {unit} (new password of worker)" for unit in units),
        "done: new password of worker",
    ]
    assert all(main_pid(host, unit) not in (0, before[unit]) for unit in units)
    host.ok("! test -e /run/gpuinfer-upgrade")
    assert result(host, predict(host))["status"] == "completed"


def test_a_line_that_redis_rejects_keeps_nothing_from_starting(host: Container) -> None:
    """In the administrator's own file: ours work, theirs is named."""
    file = "/etc/gpuinfer/redis-users.acl"
    host.ok(
        f"cp -p {file} /root; echo 'user shop on nopass +nosuch' >>{file}; systemctl restart gpuinfer-redis"
    )
    host.ok("gpuinfer queue status")
    told = host.ok("journalctl --sync; journalctl -u gpuinfer-redis -p warning -o cat")
    assert f"{file}: line " in told
    assert "(user shop): " in told
    assert "(user shop): " in host.sh("gpuinfer doctor redis").output
    host.ok(f"rm {file}; systemctl restart gpuinfer-redis; cp -p /root/redis-users.acl {file}")
    host.ok("systemctl restart gpuinfer-redis")


def test_the_doctor_finds_nothing_wrong(host: Container) -> None:
    """On a sound host without a GPU ``gpuinfer doctor`` ends with 0 and says so to programs too."""
    start_worker(host)
    host.until("curl -sf http://127.0.0.1:8080/health/ready", what="the API to know of a worker")
    both = "gpuinfer doctor && gpuinfer doctor --json >/root/found"
    host.until(both, what="a clean bill of health")
    found = json.loads(host.ok("cat /root/found"))["findings"]
    assert not [finding for finding in found if finding["status"] == "error"]
    assert "came back" in next(one["message"] for one in found if one["check"] == "work.request")


def test_the_man_pages_and_the_completion_are_there(host: Container) -> None:
    """`man gpuinfer` and its like, the documents, and TAB work."""
    for page, word in (
        ("1 gpuinfer", "submit"),
        ("5 gpuinfer.toml", "maxmemory_mb"),
        ("5 gpuinfer-model", "hard_time_limit_s"),
        ("7 gpuinfer", "gpuinfer-restore@"),
    ):
        assert word in host.ok(f"man {page}"), page
    for file in (ROOT / "README.md", *(ROOT / "packaging" / "doc").glob("*.md")):
        installed = host.ok(f"zcat -f /usr/share/doc/gpuinfer/{file.name}*")
        assert installed.strip() == file.read_text().strip(), file.name
    host.ok("test -e /usr/share/doc/gpuinfer/examples/text-encoder/model.toml")
    said = host.ok(
        "source /usr/share/bash-completion/bash_completion; _completion_loader gpuinfer; complete -p gpuinfer"
    )
    assert "gpuinfer" in said
