# SPDX-License-Identifier: Apache-2.0
"""The packages as built from this checkout, and hosts on which they are installed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.conftest import need
from tests.host.container import Container, discard, new_state, sweep
from tests.host.root import HostError, missing, root, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def debs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Build both packages from this checkout, with what is not committed yet; return them, torch last.

    $GPUINFER_DEBS names a folder of packages to test instead.
    """
    lacking = missing()
    need(not lacking, f"what boots a container ({lacking})")
    if os.environ.get("GPUINFER_DEBS"):
        return sorted(Path(os.environ["GPUINFER_DEBS"]).glob("*.deb"), key=lambda file: "torch" in file.name)
    return build(tmp_path_factory.mktemp("debs"))


def build(folder: Path, *options: str, tree: Path = ROOT, by: Sequence[str] = ()) -> list[Path]:
    """Build packages of a tree as it is, by a command such as ``env``; return them, torch last."""
    changed = run("git", "-C", tree, "status", "--porcelain")
    worktree = ["--worktree"] if changed else []
    run(*by, tree / "packaging/build-deb", "--out", folder, *worktree, *options)
    return sorted(folder.glob("*.deb"), key=lambda file: "torch" in file.name)


@pytest.fixture(scope="session")
def installed(debs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A host with the packages installed, switched off: the layers on which others are booted."""
    state = Path(tmp_path_factory.mktemp("installed", numbered=False))
    sweep()
    host = Container(root(), state=new_state("installed"))
    try:
        with host:
            install(host, debs)
            (state / "apt.log").write_text(host.ok("cat /var/log/apt/term.log"))
            host.poweroff()
        yield f"{host.state}/upper:{root()}"
    finally:
        host.close()
        discard(host.state)


@pytest.fixture(scope="module")
def host(installed: str) -> Iterator[Container]:
    """A running host of this module's own, freshly installed and booted."""
    with Container(installed) as container:
        container.until("curl -sf http://127.0.0.1:8080/health/live", what="the API")
        yield container


def install(host: Container, debs: list[Path]) -> str:
    """``apt install`` the packages for real; return what it said."""
    host.ok("mkdir -p /packages")
    for deb in debs:
        host.copy(deb, "/packages/")
    names = " ".join(f"/packages/{deb.name}" for deb in debs)
    said = host.ok(f"apt-get install -y -o Dpkg::Options::=--force-confold {names}", timeout=300)
    if "rror" in said:
        raise HostError(f"apt-get install complains:\n{said}")
    host.ok("rm -r /packages")
    return said
