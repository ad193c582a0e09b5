# SPDX-License-Identifier: Apache-2.0
"""Upgrade, reboot, remove, purge, reinstall: the package's life on one host, in that order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.host.admin import main_pid, predict, properties, result
from tests.host.conftest import install
from tests.host.container import Container
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


def test_upgrade_keeps_an_admins_edit_and_rolls_the_workers(host: Container, next_version: Path) -> None:
    """A newer package: the edited conffile stays, each worker drains and is ready again, nothing is lost."""
    host.ok("sed -i 's/^#result_ttl_s = .*/result_ttl_s = 7200/' /etc/gpuinfer/gpuinfer.toml")
    host.ok("systemctl enable --now gpuinfer-worker@0 gpuinfer-worker@1")
    before = {
        unit: main_pid(host, unit) for unit in ("gpuinfer-worker@0", "gpuinfer-worker@1", "gpuinfer-api")
    }
    ids = [predict(host) for _ in range(3)]
    host.copy(next_version, "/root/next.deb")
    said = host.ok("apt-get install -y -o Dpkg::Options::=--force-confold /root/next.deb", timeout=300)
    assert "+next" in host.ok("dpkg-query -W gpuinfer")
    assert "result_ttl_s = 7200" in host.ok("cat /etc/gpuinfer/gpuinfer.toml")
    for unit, pid in before.items():
        host.ok(f"systemctl is-active {unit}")
        assert main_pid(host, unit) != pid, f"{unit} runs the old code\n{said}"
        if "worker" in unit:
            assert properties(host, unit, "Result")["Result"] == "success"
    for task_id in [*ids, predict(host)]:
        assert result(host, task_id)["status"] == "completed"


def test_a_reboot_brings_it_all_back(host: Container) -> None:
    """After a reboot the enabled workers serve again, and what waited is done."""
    host.ok("systemctl stop gpuinfer-watcher gpuinfer-workers.target 'gpuinfer-worker@*'")
    waiting = predict(host)
    host.reboot()
    host.until(
        "systemctl is-active gpuinfer-worker@0 gpuinfer-worker@1 gpuinfer-redis gpuinfer-api", timeout=90
    )
    assert result(host, waiting)["status"] == "completed"
    assert result(host, predict(host))["status"] == "completed"
    assert "worker_ready" in host.ok("journalctl -b -1 -o json -u gpuinfer-worker@0 | cat")


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
    host.ok("mkdir -p /run/gpuinfer-upgrade; touch /run/gpuinfer-upgrade/redis")
    install(host, debs[:1])
    host.until("systemctl is-active gpuinfer-worker@0 gpuinfer-api", timeout=60)
    assert "result_ttl_s = 7200" in host.ok("cat /etc/gpuinfer/gpuinfer.toml")
    assert result(host, predict(host))["status"] == "completed"


def test_purge_leaves_only_what_the_admin_made(host: Container) -> None:
    """`apt purge`: no file, unit, or process of ours is left, but the admin's own model is."""
    host.ok("apt-get purge -y gpuinfer gpuinfer-torch-cpu", timeout=300)
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
