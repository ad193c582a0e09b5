# SPDX-License-Identifier: Apache-2.0
"""What the package does to a host beside its own folders: what host.md lists; nothing once it is purged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.admin import main_pid
from tests.host.conftest import ROOT, install
from tests.host.container import Container
from tests.host.root import root

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

#: An administrator's own unit whose name begins as ours do, and settings that sort before any package's.
PROXY = "[Service]\nExecStart=/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n"
JOURNALD, SYSCTL = "/etc/systemd/journald.conf.d/10-mine.conf", "/etc/sysctl.d/10-mine.conf"
#: What packaging/doc/host.md calls the package's own folders.
FOLDERS = (
    *("/usr/lib/gpuinfer", "/usr/lib/gpuinfer-torch", "/usr/share/gpuinfer"),
    *("/etc/gpuinfer", "/var/lib/gpuinfer", "/var/cache/gpuinfer", "/run/gpuinfer"),
)
#: What changes on a host by itself, or is apt's, dpkg's, or systemd's own account of what was installed.
NOT_OURS = (
    r"/(proc|sys|dev|run|tmp|packages)(/|$)|/var/(log|cache/apt|cache/debconf|cache/ldconfig|lib/apt|lib/dpkg)(/|$)"
    r"|/var/lib/(systemd|redis|private|polkit-1)(/|$)|/var/cache/man(/|$)|/root(/|$)|/etc/(ld\.so\.cache|\.pwd\.lock)$"
    r"|/etc/(passwd|group|shadow|gshadow)-?$|/var/tmp(/|$)|/usr/lib/python3(\.11)?/.*__pycache__"
)


@pytest.fixture(scope="module")
def bare() -> Iterator[Container]:
    """A Debian without the package, on which somebody has settings and a unit of his own."""
    with Container(root()) as host:
        host.put("/etc/systemd/system/gpuinfer-proxy.service", PROXY)
        host.put(JOURNALD, "[Journal]\nSystemMaxUse=500M\n")
        host.put(SYSCTL, "vm.overcommit_memory = 2\n")
        host.ok("systemctl daemon-reload; systemctl enable --now gpuinfer-proxy")
        host.ok("systemctl restart systemd-journald")
        host.ok("systemctl stop '*.timer'")  # some write at midnight
        yield host


def files(host: Container) -> dict[str, str]:
    """Return path -> kind, mode, owner, link, and of a file its size and time of change."""
    said = host.ok(r"find / -xdev -printf '%p\t%y %m %u:%g %l\t%s %T@\n'")
    found = {}
    for line in said.splitlines():
        path, what, size = line.split("\t")
        if not re.match(NOT_OURS, path):
            found[path] = f"{what} {size}" if what.startswith("f") else what
    return found


def state(host: Container) -> dict[str, str]:
    """Return what the host's own services read and are: journald's and sysctl's settings, processes."""
    return {
        "journald": host.ok("systemd-analyze cat-config systemd/journald.conf"),
        "sysctl": host.ok("systemd-analyze cat-config sysctl.d | grep -v -e '^#' -e '^$' | cat"),
        "kernel": host.ok("sysctl -a 2>/dev/null | grep -E '^(vm|net.core)\\.' | cat"),
        "enabled": host.ok(
            "systemctl list-unit-files --state=enabled --no-legend --plain | grep -v gpuinfer-proxy"
        ),
        "journald runs": str(main_pid(host, "systemd-journald")),
        "proxy runs": str(main_pid(host, "gpuinfer-proxy")),
        "redis runs": str(main_pid(host, "redis-server")),
    }


def promised() -> list[str]:
    """Return the paths that packaging/doc/host.md lists as outside of our own folders."""
    page = (ROOT / "packaging" / "doc" / "host.md").read_text()
    table = page.split("| outside its own folders |", 1)[1].split("\n\n", 1)[0]
    return [path for row in table.splitlines()[2:] for path in re.findall(r"`(/[^`]+)`", row.split("|")[1])]


def known(path: str, listed: list[str]) -> bool:
    """Tell whether host.md lists a path, with a * for a part of a name, or a folder above it."""
    patterns = [re.escape(one).replace(r"\*", "[^/]*") for one in listed]
    return any(re.fullmatch(rf"{pattern}(/.*)?", path) for pattern in patterns)


def test_what_the_package_does_to_a_host(bare: Container, debs: list[Path]) -> None:
    """Installed, used, removed, purged: what is new is listed in host.md, what was there stays as it was."""
    before, was = files(bare), state(bare)
    install(bare, debs)
    bare.ok("systemctl enable --now gpuinfer-worker@0")
    now, listed = files(bare), [*FOLDERS, *promised()]
    assert {path for path in before if now.get(path) != before[path] and not is_folder(before[path])} == set()
    assert {path for path in now if path not in before and not known(path, listed)} == set()
    for name, value in was.items():
        if name != "enabled":
            assert state(bare)[name] == value, name
    said = bare.ok("apt-get remove -y gpuinfer", timeout=300)
    assert state(bare)["proxy runs"] == was["proxy runs"], said
    bare.ok("apt-get purge -y gpuinfer gpuinfer-torch-cpu", timeout=300)
    assert state(bare) == was
    after = files(bare)
    assert {path for path in after if path not in before} == set()
    assert {path for path in before if after.get(path) != before[path]} == set()
    # As sysusers.d has it: nobody else inherits what a number once owned.
    assert (
        bare.ok("getent passwd gpuinfer-worker gpuinfer-redis gpuinfer-api gpuinfer-watcher | wc -l").strip()
        == "4"
    )
    assert bare.ok("getent group gpuinfer")


def is_folder(what: str) -> bool:
    return what.startswith("d ")
