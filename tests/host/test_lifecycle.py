# SPDX-License-Identifier: Apache-2.0
"""Upgrade, reboot, remove, purge, reinstall: the package's life on one host, in that order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.host.admin import (
    STARTED,
    STOPPING,
    actions,
    active,
    journal,
    main_pid,
    predict,
    properties,
    result,
)
from tests.host.conftest import install
from tests.host.container import Container
from tests.host.gate import gated, let_go, shut
from tests.host.root import run

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def next_version(debs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same package as a later version, and with another default in a conffile."""
    tree = tmp_path_factory.mktemp("next") / "tree"
    run("dpkg-deb", "-R", debs[0], tree)
    control = tree / "DEBIAN/control"
    text = control.read_text()
    version = next(line.split()[1] for line in text.splitlines() if line.startswith("Version:"))
    control.write_text(text.replace(f"Version: {version}", f"Version: {version}+next"))
    shipped = tree / "etc/gpuinfer/gpuinfer.toml"
    shipped.write_text(shipped.read_text() + "\n# a line of the next version\n")
    package = tree.parent / "gpuinfer_next_amd64.deb"
    run("dpkg-deb", "-Zzstd", "-z1", "-b", tree, package)
    return package


#: It lies beside the keys, and is none.
KEPT = "/etc/gpuinfer/keys.d/mine.txt"
WORKERS = ("gpuinfer-worker@0.service", "gpuinfer-worker@1.service")
GATES = ("/run/gate0", "/run/gate1")


@pytest.fixture(scope="module")
def busy(host: Container, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Workers 0 and 1, enabled, that also serve a model, with a gate each; the first has no start left."""
    folder = gated(tmp_path_factory.mktemp("models") / "slow")
    host.copy(folder, "/var/lib/gpuinfer/models/")
    host.ok("chmod -R a+rX /var/lib/gpuinfer/models; systemctl stop gpuinfer-watcher")
    for number in (0, 1):
        own = f"GPUINFER_WORKER_MODELS=digits,slow\nGATE={GATES[number]}\n"
        host.put(f"/etc/gpuinfer/worker@{number}.env", own)
    limit = "[Unit]\nStartLimitBurst=2\n"
    host.put("/etc/systemd/system/gpuinfer-worker@0.service.d/limit.conf", limit)
    host.ok("systemctl daemon-reload; systemctl enable --now gpuinfer-worker@0 gpuinfer-worker@1")
    host.ok("systemctl restart gpuinfer-worker@0")


def test_upgrade_keeps_what_an_admin_set(host: Container, next_version: Path, busy: None) -> None:
    """A newer package: edited conffiles, the kernel's settings and what is disabled stay; all else runs anew.

    journald, whose drop-in is the same, is left alone.
    """
    host.ok("sed -i 's/^#result_ttl_s = .*/result_ttl_s = 7200/' /etc/gpuinfer/gpuinfer.toml")
    host.ok("systemctl disable gpuinfer-watcher; sysctl -w net.core.somaxconn=8192")
    host.ok(f"echo mine >{KEPT}")
    units = [*WORKERS, "gpuinfer-api"]
    before = {unit: main_pid(host, unit) for unit in units}
    journald = main_pid(host, "systemd-journald")
    host.copy(next_version, "/root/next.deb")
    # apt's two steps apart: by the second, which rolls, the workers must have begun what they are to end.
    host.ok("dpkg --force-confold --unpack /root/next.deb", timeout=300)
    for gate in GATES:
        shut(host, gate)
    ids = [predict(host, '{"inputs": [1.0], "model": "slow"}') for _ in range(6)]
    for unit in WORKERS:
        host.until(f"journalctl _SYSTEMD_UNIT={unit} ACTION=batch_running | grep -q slow")
    said = host.ok("dpkg --force-confold --configure gpuinfer")
    # dpkg has not waited: the first worker still ends what it runs. What follows is in the journal.
    assert "journalctl -fu gpuinfer-roll" in said
    assert main_pid(host, WORKERS[0]) == before[WORKERS[0]]
    for unit, gate in zip(WORKERS, GATES, strict=True):
        host.until(f"[ $(systemctl show -P ActiveState {unit}) = deactivating ]", what=f"{unit} to be told")
        let_go(host, gate)
    host.until("journalctl -b -u gpuinfer-roll | grep -q 'done: new version'")
    assert "+next" in host.ok("dpkg-query -W gpuinfer")
    assert "result_ttl_s = 7200" in host.ok("cat /etc/gpuinfer/gpuinfer.toml")
    assert host.ok("sysctl -n net.core.somaxconn").strip() == "8192"
    assert host.ok(f"cat {KEPT}; stat -c '%a %U %G' /etc/gpuinfer/keys.d").split() == [
        *("mine", "750", "root", "gpuinfer-api")
    ]
    assert host.sh("systemctl is-enabled gpuinfer-watcher").output.strip() == "disabled"
    assert main_pid(host, "systemd-journald") == journald
    for unit, pid in before.items():
        host.ok(f"systemctl is-active {unit}")
        assert main_pid(host, unit) != pid, f"{unit} runs the old code\n{said}"
    for task_id in [*ids, predict(host)]:
        assert result(host, task_id)["status"] == "completed"
    _rolled(host, {unit: before[unit] for unit in WORKERS})
    assert not {"restored", "task_dead_lettered"} & set(actions(journal(host, "-b")))


def _rolled(host: Container, old: dict[str, int]) -> None:
    """Hold that each worker ended its batch, and the second went when the first was ready again."""
    entries = journal(host, "-b", "_PID=1")
    told = [
        (entry["UNIT"], entry["MESSAGE_ID"], int(entry["__MONOTONIC_TIMESTAMP"]))
        for entry in entries
        if entry.get("UNIT") in old and entry.get("MESSAGE_ID") in (STOPPING, STARTED)
    ][-4:]
    first, second = WORKERS
    order = [(first, STOPPING), (first, STARTED), (second, STOPPING), (second, STARTED)]
    assert [(unit, message) for unit, message, _ in told] == order
    for unit, message, at in told:
        if message == STOPPING:
            done = journal(host, "-b", f"_SYSTEMD_UNIT={unit}", f"_PID={old[unit]}", "ACTION=batch_done")
            assert [entry for entry in done if int(entry["__MONOTONIC_TIMESTAMP"]) > at], (
                f"{unit} did not drain"
            )


def test_a_reboot_brings_it_all_back(host: Container) -> None:
    """After a reboot the enabled workers serve again, and what waited is done."""
    host.ok("systemctl stop gpuinfer-watcher gpuinfer-workers.target 'gpuinfer-worker@*'")
    waiting = predict(host)
    host.reboot()
    active(host, "gpuinfer-worker@0", "gpuinfer-worker@1", "gpuinfer-redis", "gpuinfer-api")
    assert result(host, waiting)["status"] == "completed"
    assert result(host, predict(host))["status"] == "completed"
    assert "worker_ready" in host.ok("journalctl -b -1 -o json -u gpuinfer-worker@0 | cat")


def test_what_is_disabled_stays_off(host: Container) -> None:
    """Over a reboot: the API with its socket, the watcher; where the target is disabled, all of it."""
    off = ["gpuinfer-watcher.service", "gpuinfer-api.service", "gpuinfer-api.socket"]
    host.ok(f"systemctl disable {' '.join(off)}")
    host.reboot()
    active(host, "gpuinfer-worker@0", "gpuinfer-redis")
    for unit in off:
        assert properties(host, unit, "ActiveState", "UnitFileState") == {
            "ActiveState": "inactive",
            "UnitFileState": "disabled",
        }
    said = host.sh("gpuinfer doctor units").output
    for unit in off:
        assert f"{unit} is disabled and does not run" in said
    host.ok(f"systemctl enable {' '.join(off)}; systemctl disable gpuinfer.target")
    host.reboot()
    assert host.ok("systemctl list-units --plain --no-legend --state=active 'gpuinfer*' | cat").strip() == ""
    host.ok("systemctl enable gpuinfer.target; systemctl start gpuinfer.target")
    active(host, "gpuinfer-worker@0", "gpuinfer-api.socket", "gpuinfer-watcher")
    assert result(host, predict(host))["status"] == "completed"


def test_remove_stops_and_keeps(host: Container) -> None:
    """`apt remove`: all is stopped, the settings and the queue stay."""
    host.ok("mkdir -p /var/lib/gpuinfer/models/mine; echo mine > /var/lib/gpuinfer/models/mine/model.toml")
    host.ok("apt-get remove -y gpuinfer", timeout=300)
    assert host.ok("systemctl list-units --plain --no-legend 'gpuinfer*.service'").strip() == ""
    assert host.sh("pgrep -f /usr/lib/gpuinfer").code == 1
    host.ok(
        "test -e /etc/gpuinfer/gpuinfer.toml; test -d /var/lib/gpuinfer/redis && ! test -e /usr/bin/gpuinfer"
    )


def test_reinstall_finds_its_settings_again(host: Container, debs: list[Path]) -> None:
    """Installed again, it runs as before, also after an upgrade that came to nothing."""
    host.ok("mkdir -p /run/gpuinfer-upgrade; touch /run/gpuinfer-upgrade/redis /run/gpuinfer-upgrade.before")
    install(host, debs[:1])
    active(host, "gpuinfer-worker@0", "gpuinfer-api")
    assert "result_ttl_s = 7200" in host.ok("cat /etc/gpuinfer/gpuinfer.toml")
    host.ok(f"test -e {KEPT}")
    assert result(host, predict(host))["status"] == "completed"


def test_purge_leaves_only_what_the_admin_made(host: Container) -> None:
    """`apt purge`: no file, unit, or process of ours is left, but the admin's own model and mounts are."""
    redis = "/var/lib/gpuinfer/redis"
    # The target has stopped before Redis has, which is the last to go: by its name it is waited for.
    host.ok(f"systemctl stop gpuinfer.target gpuinfer-redis 'gpuinfer-worker@*'; rm -r {redis}/*")
    host.ok(f"mount -t tmpfs none {redis} && systemctl start gpuinfer.target && ls {redis}/appendonlydir")
    said = host.ok("apt-get purge -y gpuinfer gpuinfer-torch-cpu", timeout=300)
    assert f"kept, because it could not be removed: {redis}" in said
    host.ok("! test -e /etc/gpuinfer/keys.d")
    assert host.ok(f"ls -A {redis}; umount {redis} && rmdir {redis}") == ""
    host.ok("rm -r /etc/gpuinfer /etc/systemd/system/gpuinfer-* /var/lib/gpuinfer/models/slow")
    left = host.ok(
        "find / -xdev \\( -path /proc -o -path /sys -o -path /var/log/journal \\) -prune"
        " -o -name '*gpuinfer*' -print"
        " | grep -v -E '^/(tmp|root)/' || true"
    ).split()
    ours = [path for path in left if path != "/var/lib/gpuinfer"]
    assert ours == [], ours
    assert host.ok("find /var/lib/gpuinfer -type f").split() == ["/var/lib/gpuinfer/models/mine/model.toml"]
    assert host.ok("systemctl list-unit-files --no-legend 'gpuinfer*' | cat").strip() == ""
    assert "gpuinfer" not in host.ok("systemctl --failed --no-pager --no-legend | cat")
    assert host.ok("redis-cli -p 6379 ping").strip() == "PONG"
