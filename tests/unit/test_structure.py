# SPDX-License-Identifier: Apache-2.0
"""The house rules that can be checked: who may import whom, and what lies where."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gpuinfer"
#: Programs of their own: they share rooms, and never import each other.
PROGRAMS = ("api", "worker", "watcher")
#: Whoever starts the programs may import them; nobody imports these.
STARTERS = ("demo", "serve", "cli")
SHARED = (
    "client",
    "queue",
    "keys",
    "models",
    "settings",
    "sources",
    "errors",
    "names",
    "locks",
    "log",
    "journal",
    "metrics",
    "alerts",
    "gpus",
    "gpu_binding",
    "gpu_readings",
    "installed_torch",
    "nvml",
    "privileges",
)
#: Rooms and single modules from the bottom up: each may use what stands below it. Those of one level do
#: not use each other.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "redis_url", "addresses", "certificate", "cli_help", "names", "plural", "nvml"),
    ("sections", "env_file"),
    ("sources",),
    ("settings", "journal"),
    ("log", "gpus", "locks", "instances", "privileges"),
    ("gpu_binding", "gpu_readings", "installed_torch"),
    ("models",),
    ("queue",),
    ("client", "broker", "keys", "metrics"),
    ("alerts",),
    PROGRAMS,
    ("doctor",),
    ("view",),
    ("demo", "celery", "config", "gpus_cli", "flower"),
    ("celery_cli", "serve"),
    ("cli",),
    ("__main__",),
)
#: The commands of a room, which the command line alone calls: they may use all that the programs may.
DOOR = re.compile(r"(.+_)?cli")
#: A module that is named by a string: Celery's ``include`` and ``worker_consumer``, the table of commands.
NAMED = re.compile(r"(gpuinfer(?:\.\w+)+)(?::\w+)?")
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


@cache
def modules() -> dict[str, set[str]]:
    """Return each module's name -> the modules of ours it uses: imported anywhere, or named by a string."""
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}
    used: dict[str, set[str]] = {}
    for module, file in files.items():
        used[module] = set()
        for full in (*imports_of(file), *strings_of(file)):
            name = full
            while name and name not in files:
                name = name.rpartition(".")[0]
            # Every import runs the package itself first, which imports nothing before it is asked to.
            if name not in ("", "gpuinfer", module):
                used[module].add(name)
    return used


def strings_of(file: Path) -> Iterator[str]:
    """Yield what a file may import by name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = NAMED.fullmatch(node.value)
            if found:
                yield found[1]


def level_of(module: str) -> int:
    """Return where a module stands."""
    parts = module.split(".")
    level = next((number for number, rooms in enumerate(LEVELS) if parts[1] in rooms), None)
    assert level is not None, f"{module} stands on no level; enter {parts[1]} into LEVELS"
    return max(level, LEVELS.index(PROGRAMS)) if DOOR.fullmatch(parts[-1]) else level


def test_no_arrow_points_upwards() -> None:
    """A module uses what stands below it or in its own room, also by a string or for types alone."""
    wrong = [
        f"{module} uses {name}"
        for module, used in modules().items()
        if module != "gpuinfer"
        for name in used
        if level_of(name) > level_of(module)
        or (level_of(name) == level_of(module) and name.split(".")[1] != module.split(".")[1])
    ]
    assert wrong == []


def test_no_import_goes_in_a_circle() -> None:
    """Not even inside functions, by a string, or for types alone."""
    graphlib.TopologicalSorter(modules()).prepare()  # raises CycleError, which names the circle


def test_the_rules_see_strings_and_types() -> None:
    """What would be easy to miss is seen: a consumer named by a string, an import for types."""
    assert "gpuinfer.worker.consumer" in modules()["gpuinfer.worker.app"]
    assert "gpuinfer.worker.batcher" in modules()["gpuinfer.worker.heartbeat"]
    assert "gpuinfer.queue.tasks" in modules()["gpuinfer.queue.app"]
    assert level_of("gpuinfer.models.cli") == level_of("gpuinfer.worker.app") > level_of("gpuinfer.queue.app")


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
