# SPDX-License-Identifier: Apache-2.0
"""Collect the kit: wheels for another Python, redis-server with its libraries, our own wheel.

torch, numpy and what torch needs are not in it: the GPU machine has them, built for its driver.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import click
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.gpu.kit import KIT, LIMIT_BYTES, ROOT, Facts, digest_of, read, size_of
from tests.services import redis_binary

LOCKS = [ROOT / "packaging" / name for name in ("requirements.lock", "requirements-dev.lock")]
#: What the suite itself needs besides gpuinfer.
TOOLS = ("pytest", "pytest-asyncio", "pytest-timeout")
#: On the GPU machine already, for its driver; so is what only they need.
THERE = frozenset({"torch", "numpy"})
#: These have no wheel: one is built.
SOURCES = frozenset({"sdnotify"})
#: glibc 2.N of the platforms whose wheels run there. pip takes each one literally.
_GLIBC = range(34, 4, -1)
_PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in _GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
_MIB = 1024 * 1024
#: Starts redis-server with the C library it was built for, whatever the machine's own is.
_WRAPPER = """#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
here=$(dirname "$(readlink -f "$0")")
exec "$here/lib/{loader}" --library-path "$here/lib" "$here/lib/redis-server" "$@"
"""


def needed(python: str) -> set[str]:
    """Return the names of the packages that gpuinfer and the suite need under that Python, without ours."""
    environment: dict[str, str] = {str(name): str(value) for name, value in default_environment().items()}
    environment |= {"python_version": python, "python_full_version": f"{python}.0"}
    found: dict[str, set[str]] = {}
    todo = [Requirement(name) for name in ("gpuinfer[host]", *TOOLS)]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        extras = {"", *requirement.extras}
        if name in THERE or extras <= found.get(name, set()):
            continue
        found.setdefault(name, set()).update(extras)
        for line in metadata.requires(name) or ():
            deeper = Requirement(line)
            marker = deeper.marker
            if marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in extras):
                todo.append(deeper)
    return found.keys() - {"gpuinfer"}


def locked() -> dict[str, str]:
    """Return package -> its lines in the lock files: the pin, and the hashes."""
    text = "\n".join(lock.read_text(encoding="utf-8") for lock in LOCKS)
    blocks = re.findall(r"(?m)^[a-z0-9].*(?:\n[ \t]+.*)*", text)
    return {str(canonicalize_name(block.partition("==")[0])): block for block in blocks}


def pip(*arguments: str | Path) -> None:
    """Run pip quietly. Raises CalledProcessError, with pip's words on the terminal."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--no-input",
        "--disable-pip-version-check",
        "--quiet",
        *arguments,
    ]
    subprocess.run(command, check=True, cwd=ROOT)


def collect_wheels(target: Path, python: str) -> None:
    """Put the wheels of all that is needed into a folder."""
    pins, names = locked(), needed(python)
    if absent := sorted(names - pins.keys()):
        raise click.ClickException(f"Python {python} needs {', '.join(absent)}, and no lock file pins that")
    with tempfile.TemporaryDirectory() as scratch:
        ready, source = (Path(scratch, name) for name in ("wheels.txt", "sources.txt"))
        ready.write_text("\n".join(pins[name] for name in sorted(names - SOURCES)), encoding="utf-8")
        source.write_text("\n".join(pins[name] for name in sorted(names & SOURCES)), encoding="utf-8")
        options = ["--no-deps", "--require-hashes"]
        platforms = [part for name in _PLATFORMS for part in ("--platform", name)]
        wanted = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python, *platforms]
        pip("download", *options, *wanted, "--dest", target, "-r", ready)
        pip("wheel", *options, "--wheel-dir", target, "-r", source)
    if others := [wheel.name for wheel in target.iterdir() if wheel.suffix != ".whl"]:
        raise click.ClickException(f"no wheels: {', '.join(others)}")


def collect_redis(target: Path) -> str:
    """Put redis-server, its libraries and a wrapper into a folder; return its version."""
    found = redis_binary()
    if found is None:
        raise click.ClickException("there is no redis-server to pack; packaging/setup-env installs one")
    binary, library = Path(found).resolve(), target / "lib"
    library.mkdir(parents=True)
    shutil.copy2(binary, library / "redis-server")
    listed = subprocess.run(["ldd", binary], check=True, capture_output=True, text=True).stdout
    for path in re.findall(r"(?:=> |^\s*)(/\S+) \(0x", listed, re.M):
        shutil.copy2(Path(path).resolve(), library / Path(path).name)
    loaders = [file.name for file in library.glob("ld-linux*")]
    if len(loaders) != 1:
        raise click.ClickException(f"ldd names no loader for {binary}:\n{listed}")
    wrapper = target / "redis-server"
    wrapper.write_text(_WRAPPER.format(loader=loaders[0]), encoding="utf-8")
    wrapper.chmod(0o755)
    return version_of(wrapper)


def version_of(redis_server: Path) -> str:
    """Return the version of a redis-server, which shows that it starts."""
    said = subprocess.run([redis_server, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"v=(\S+)", said)
    if match is None:
        raise click.ClickException(f"{redis_server} says {said!r}")
    return match[1]


def stamp_of(python: str) -> str:
    """Return a digest of what decides which wheels are collected."""
    files = [*LOCKS, ROOT / "pyproject.toml", Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files) + python.encode()).hexdigest()


def table(rows: Iterable[tuple[str, int]]) -> str:
    """Return lines of sizes in MiB."""
    return "\n".join(f"{size / _MIB:8.2f} MiB  {name}" for name, size in rows)


def sizes(kit: Path) -> list[tuple[str, int]]:
    """Return each part of a kit with its bytes, the largest first; the total last."""
    parts = [(wheel.name, wheel.stat().st_size) for wheel in (kit / "wheels").iterdir()]
    parts.append(("redis-server and its libraries", size_of(kit / "redis")))
    parts.sort(key=lambda part: -part[1])
    return [*parts, (f"in all, of {LIMIT_BYTES // _MIB} MiB at most", size_of(kit))]


def pack(kit: Path, python: str) -> None:
    """Make the kit, or bring one up to date. What is there is replaced only by a whole new one."""
    old, stamp = read(kit), stamp_of(python)
    fresh = kit.with_name(f"{kit.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    wheels = fresh / "wheels"
    try:
        if old is not None and old.wheels == stamp:
            shutil.copytree(kit / "wheels", wheels, ignore=shutil.ignore_patterns("gpuinfer-*"))
        else:
            wheels.mkdir(parents=True)
            collect_wheels(wheels, python)
        pip("wheel", "--no-deps", "--wheel-dir", wheels, ROOT)
        version = collect_redis(fresh / "redis")
        Facts(python=python, sources=digest_of(), wheels=stamp, redis=version).write(fresh)
        shutil.rmtree(kit, ignore_errors=True)
        fresh.rename(kit)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@click.command(epilog="Example: tests/gpu/pack && tests/gpu/run --dry-run")
@click.option("--python", default="3.12", show_default=True, metavar="X.Y", help="The GPU machine's Python.")
@click.option(
    "--into", type=click.Path(path_type=Path), default=KIT, help="The folder; default: tests/gpu/kit."
)
@click.option("--brief", is_flag=True, help="Print the total alone.")
def main(python: str, into: Path, brief: bool) -> None:
    """Collect what a bare GPU machine lacks into one folder, and print its size."""
    into.parent.mkdir(parents=True, exist_ok=True)
    try:
        pack(into.resolve(), python)
    except subprocess.CalledProcessError as exc:
        raise click.ClickException(f"{_words(exc.cmd)} ended with {exc.returncode}") from None
    rows: Sequence[tuple[str, int]] = sizes(into)
    click.echo(table(rows[-1:] if brief else rows))
    if rows[-1][1] > LIMIT_BYTES:
        raise click.ClickException("the kit is too large: look at its largest parts, above")


def _words(command: Sequence[object]) -> str:
    return " ".join(str(part) for part in command[:6])


if __name__ == "__main__":
    main()
