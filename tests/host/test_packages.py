# SPDX-License-Identifier: Apache-2.0
"""The packages themselves: the same bytes each time, nothing for lintian to say, and a signed repository."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.host.conftest import ROOT, build
from tests.host.container import Container
from tests.host.root import root, run

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

URL, SERVED = "http://127.0.0.1:8000", "/srv/repo"
DIST = f"{SERVED}/dists/bookworm"
#: What must leave no trace in a package: where, when and by whom it is built, and on how many cores.
ELSEWHERE = ("TZ=Pacific/Kiritimati", "LC_ALL=C", "LANGUAGE=de", "USER=somebody")
ONE_CORE = ("taskset", "-c", "0")


@pytest.fixture(scope="module")
def twice(debs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two builds of gpuinfer from the same tree; one elsewhere, and looked over by lintian."""
    again, other = (tmp_path_factory.mktemp(name) for name in ("again", "other"))
    tree, known = ROOT, debs
    if os.environ.get("GPUINFER_DEBS"):  # which may be of any tree; whoever works on this one builds a copy
        tree, known = tmp_path_factory.mktemp("clone") / "tree", []
        run("git", "clone", "-q", "--shared", ROOT, tree)
    with (
        tempfile.TemporaryDirectory(prefix="gpuinfer-elsewhere-", dir="/var/tmp") as folder,
        ThreadPoolExecutor() as pool,
    ):
        there = ("env", *ELSEWHERE, f"TMPDIR={folder}", *ONE_CORE)
        second = pool.submit(build, other, "--only", "gpuinfer", "--lintian", tree=tree, by=there)
        first = known or build(again, "--only", "gpuinfer", tree=tree)
        return first[0], second.result()[0]


@pytest.fixture(scope="module")
def repository(debs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of both packages, signed by a key of its own."""
    folder = tmp_path_factory.mktemp("repo") / "repo"
    # Short, and not below pytest's folder: gpg's agent listens on a socket in it.
    with tempfile.TemporaryDirectory(prefix="gpuinfer-key-") as key:
        said = run("env", f"GNUPGHOME={key}", ROOT / "packaging/build-repo", "--url", URL, *debs, folder)
    assert f"curl -fsSL {URL}/gpuinfer.sources -o /etc/apt/sources.list.d/gpuinfer.sources" in said
    return folder


@pytest.fixture(scope="module")
def fleet_host(repository: Path) -> Iterator[Container]:
    """A bare Debian, without gpuinfer, that knows the repository and no other; it serves it to itself."""
    with Container(root()) as host:
        host.copy(repository, "/srv/")
        host.ok(f"systemd-run -q --unit=repo python3.11 -m http.server -b 127.0.0.1 -d {SERVED} 8000")
        host.ok("rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*")
        fetch = f"curl -fsSL {URL}/gpuinfer.sources -o /etc/apt/sources.list.d/gpuinfer.sources"
        host.until(fetch, what="the repository's server")
        yield host


def test_the_same_tree_gives_the_same_bytes(twice: tuple[Path, Path]) -> None:
    """Two builds of a commit are one file, wherever and whenever they are made."""
    first, second = (hashlib.sha256(deb.read_bytes()).hexdigest() for deb in twice)
    assert first == second, f"diffoscope {twice[0]} {twice[1]} tells where"


def test_lintian_has_nothing_to_say(twice: tuple[Path, Path]) -> None:
    """No error, no warning: with one, ``build-deb --lintian`` had failed and shown it."""
    assert twice[1].is_file()


@pytest.mark.parametrize("inline", [True, False], ids=["InRelease", "Release.gpg"])
def test_a_repository_that_was_changed_is_refused(fleet_host: Container, *, inline: bool) -> None:
    """One word of Release is another: apt trusts nothing of it, and installs nothing."""
    hide = "true" if inline else f"rm {DIST}/InRelease"
    change = f"sed -i s/^Label:.gpuinfer/Label:.stranger/ {DIST}/*Release"
    fleet_host.ok(f"cp -a {DIST} /srv/signed; {hide}; {change}")
    try:
        said = fleet_host.sh("apt-get update")
        assert said.code != 0
        assert re.search(r"BADSIG|signatures were invalid", said.output), said
        said = fleet_host.sh("apt-get install -y gpuinfer")
        assert said.code != 0
        assert "Unable to locate package gpuinfer" in said.output
    finally:
        fleet_host.ok(f"rm -r {DIST}; mv /srv/signed {DIST}; rm -rf /var/lib/apt/lists/*")


def test_a_host_installs_from_the_repository(fleet_host: Container, debs: list[Path]) -> None:
    """``apt install gpuinfer`` brings torch's package too, with no question and no complaint, and it runs."""
    fleet_host.ok("apt-get update -o APT::Update::Error-Mode=any")
    said = fleet_host.ok("apt-get install -y gpuinfer", timeout=300)
    assert not re.search(r"(?m)^[WE]: ", said), said
    # The last words of the package are what to do next.
    told = [line for line in said.splitlines() if line.startswith("gpuinfer: ")]
    assert [line.split()[1] for line in told] == ["next:", "gpuinfer", "man"], told
    for deb in debs:
        name, version, _ = deb.stem.split("_")
        assert fleet_host.ok(f"dpkg-query -W -f '${{Version}}' {name}") == version
    assert URL in fleet_host.ok("apt-cache policy gpuinfer")
    fleet_host.until("curl -sf http://127.0.0.1:8080/health/live", what="the API")
