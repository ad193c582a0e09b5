# SPDX-License-Identifier: Apache-2.0
"""An application of its own: a fresh environment with the client's libraries alone, and a real worker."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import gpuinfer
from gpuinfer.settings import variable
from tests.services import RedisServer
from tests.workers import Workers

pytestmark = pytest.mark.integration

APPLICATION = """
import asyncio, sys
from gpuinfer import AsyncClient, Client

image = [[[0.0] * 8] * 8]

async def main():
    async with AsyncClient() as client:
        return await client.result(await client.submit(image, queue="realtime"), 60)

with Client() as client:
    first = client.result(client.submit(image, model="digits", top_k=1), 60)
second = asyncio.run(main())
assert first["class"] == second["class"], (first, second)
for name in ("celery", "torch", "fastapi", "structlog", "numpy"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is there")
print(first["model"])
"""


PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def distributions() -> set[str]:
    """Return the names of all that a client needs here, extras as named."""
    found: set[str] = set()
    todo = [Requirement(line) for line in PROJECT["dependencies"]]
    while todo:
        requirement = todo.pop()
        found.add(re.sub(r"[-_.]+", "-", requirement.name).lower())
        for line in metadata.requires(requirement.name) or ():
            deeper = Requirement(line)
            extras = requirement.extras or {""}
            if deeper.marker is None or any(deeper.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(deeper)
    return found


def make_environment(folder: Path) -> Path:
    """Make an environment without pip, into which the client's libraries are copied; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python3*/site-packages"))
    for name in distributions():
        for file in metadata.distribution(name).files or ():
            if ".." not in file.parts:
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), site / file)
    shutil.copytree(Path(gpuinfer.__file__).parent, site / "gpuinfer")
    return python


def test_an_application_submits_to_a_real_worker(
    tmp_path: Path, redis_server: RedisServer, workers: Workers
) -> None:
    """What `pip install gpuinfer` brings is enough to submit and to read a result, in both drivers."""
    python = make_environment(tmp_path / "venv")
    workers.start(0)
    done = subprocess.run(
        [str(python), "-I", "-c", APPLICATION],
        env={variable("broker", "url"): redis_server.url},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "digits\n"), done.stderr
