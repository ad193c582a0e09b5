# SPDX-License-Identifier: Apache-2.0
"""The house rules that can be checked: who may import whom, and what lies where."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gpuinfer"
#: Programs of their own: they share rooms, and never import each other.
PROGRAMS = ("api", "worker", "watcher")
#: Whoever starts the programs may import them; nobody imports these.
STARTERS = ("demo", "cli")
SHARED = ("queue", "models", "settings", "errors", "locks", "log", "journal", "gpus", "privileges")
AT_THE_ROOT = {
    *("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"),
    *("gpuinfer", "systemd", "packaging", "tests", "etc"),
}


def files_of(room: str) -> Iterator[Path]:
    yield from (PACKAGE / room).rglob("*.py")
    if (PACKAGE / f"{room}.py").exists():
        yield PACKAGE / f"{room}.py"


def imports_of(file: Path) -> Iterator[str]:
    """Yield the full names a file imports, also inside functions and under TYPE_CHECKING."""
    package = ".".join(file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def rooms_used_by(room: str) -> dict[str, Path]:
    """Return room -> one file that imports it."""
    used: dict[str, Path] = {}
    for file in files_of(room):
        for name in imports_of(file):
            parts = name.split(".")
            if parts[0] == "gpuinfer" and len(parts) > 1:
                used[parts[1]] = file
    return used


@pytest.mark.parametrize("room", PROGRAMS)
def test_programs_do_not_import_each_other(room: str) -> None:
    """api, worker and watcher meet in Redis and systemd, never in one process's imports."""
    forbidden = {*PROGRAMS, *STARTERS} - {room}
    assert {name: file for name, file in rooms_used_by(room).items() if name in forbidden} == {}


@pytest.mark.parametrize("room", SHARED)
def test_shared_rooms_do_not_know_the_programs(room: str) -> None:
    """What all use depends on none of them."""
    forbidden = {*PROGRAMS, *STARTERS}
    assert {name: file for name, file in rooms_used_by(room).items() if name in forbidden} == {}


def committed() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], check=False, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    return listed.stdout.splitlines()


def test_the_root_holds_what_the_design_names() -> None:
    """A newcomer finds a handful of names at the top, and dot files."""
    tops = {name.partition("/")[0] for name in committed()}
    assert {name for name in tops if not name.startswith(".")} <= AT_THE_ROOT


def test_every_python_file_says_what_it_is() -> None:
    """The licence in one line, then one line of purpose."""
    for name in committed():
        if not name.endswith(".py") or not (ROOT / name).exists():
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), name
        assert ast.get_docstring(ast.parse(text)), f"{name} has no docstring"
