# SPDX-License-Identifier: Apache-2.0
"""A client's installation is light: what it imports, and what the others say when the extra is missing."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from gpuinfer.cli import HOST_MODULES

pytestmark = pytest.mark.unit

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
#: Lets an interpreter run as if these libraries were not installed.
HIDE = "import sys\nfor name in sys.argv[1].split(','): sys.modules[name] = None\ndel sys.argv[1]\n"


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[><=]", line)[0] for line in requirements}


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_the_client_imports_nothing_of_the_host_s() -> None:
    """No torch, Celery, FastAPI, dbus or structlog: an application has its own, or none."""
    done = run(
        "import sys, gpuinfer, gpuinfer.client, gpuinfer.client.cli, gpuinfer.cli; gpuinfer.Client\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) & (HOST_MODULES | {"billiard", "vine", "starlette"}) == set()


def test_the_host_s_modules_are_those_of_its_extra() -> None:
    """A library that is added to the extra is one that a client's command line knows to be missing."""
    providers = metadata.packages_distributions()
    of_extra = names(PROJECT["optional-dependencies"]["host"])
    of_client = names(PROJECT["dependencies"])
    assert of_extra & of_client == set()
    provided = {name for name in HOST_MODULES if {*providers[name]} & of_extra}
    assert provided == HOST_MODULES
    assert {dist for name in HOST_MODULES for dist in providers[name]} >= of_extra


@pytest.mark.parametrize("command", [("worker", "0"), ("api",), ("watcher", "run"), ("celery", "status")])
def test_a_command_that_needs_the_host_extra_says_so(command: tuple[str, ...]) -> None:
    """One line, with the way to get it, and no traceback."""
    done = run(HIDE + "from gpuinfer.cli import main; main()", ",".join(HOST_MODULES), *command)
    assert done.returncode == 69
    assert done.stderr.count("\n") == 1
    assert "pip install 'gpuinfer[host]'" in done.stderr


@pytest.mark.parametrize("command", [("--help",), ("submit", "--help"), ("config", "check"), ("--version",)])
def test_a_client_s_commands_need_no_extra(command: tuple[str, ...]) -> None:
    """What an application's machine has is enough."""
    done = run(HIDE + "from gpuinfer.cli import main; main()", ",".join(HOST_MODULES), *command)
    assert done.returncode == 0, done.stderr
