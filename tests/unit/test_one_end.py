# SPDX-License-Identifier: Apache-2.0
"""One way to end: ``states.lua`` and ``ends.lua`` alone write under a result's key, for all scripts."""

from __future__ import annotations

import ast
import re
from importlib import resources
from pathlib import Path

import pytest

from gpuinfer.queue import keys

pytestmark = pytest.mark.unit

PACKAGE = Path(__file__).parents[2] / "gpuinfer"
LUA = sorted((PACKAGE / "queue" / "lua").glob("*.lua"))
#: The state of one task, and the ends of many.
LIBRARIES = ("states", "ends")
#: Commands of redis-py, and of Redis, that read a key. Who listens to its channel writes nothing.
READING = {"get", "mget", "exists", "ttl", "strlen", "getrange", "subscribe", "unsubscribe", "GET", "MGET"}
#: What Python does with a result's name beside: takes it apart, or passes it on.
BESIDE = {
    "removeprefix",
    "result",
    "_cancel",
    "_forget",
    "append",
    "add",
    "bool",
    "parse",
    "UnreadableResult",
    "goes_on",
}


def code(file: Path) -> str:
    """Return a script without its comments."""
    return re.sub(r"--.*", "", file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "file", [file for file in LUA if file.stem not in LIBRARIES], ids=lambda one: one.stem
)
def test_no_other_script_sets_a_result(file: Path) -> None:
    """Another script does not even know how a result's key begins."""
    assert "RESULT_PREFIX" not in code(file)
    assert keys.RESULT_PREFIX not in code(file)
    assert keys.RESULT_PREFIX[:6] not in code(file)


def test_a_script_that_is_given_a_result_writes_nothing_itself() -> None:
    """``cancel`` names the key for Redis's sake; what is written there, ``finish`` writes."""
    given = [file.stem for file in LUA if re.search(r"^-- KEYS:.*result", file.read_text(), re.M)]
    assert given == ["cancel", "erase"]
    called = re.findall(r"redis\.p?call\('(\w+)'", code(PACKAGE / "queue" / "lua" / "erase.lua"))
    assert set(called) == {"TTL"}
    called = re.findall(r"redis\.p?call\('(\w+)'", code(PACKAGE / "queue" / "lua" / "cancel.lua"))
    # It reads: whether it has ended, whether its id was ever made, and whether Redis is full.
    assert set(called) == {"GETRANGE", "ZSCORE", "INFO"}


def test_final_states_go_through_one_function() -> None:
    """In the libraries, one function writes what passes, two what is final: of one task, and of many."""
    text = "".join(code(PACKAGE / "queue" / "lua" / f"{name}.lua") for name in LIBRARIES)
    functions = dict(re.findall(r"^local function (\w+)\((.*?)(?=^local function|\Z)", text, re.M | re.S))
    writing = {name for name, body in functions.items() if re.search(r"'(SET|DEL|SETEX|APPEND)', ", body)}
    calling = {name for name in writing if re.search(r"redis\.call\('(SET|DEL)'", functions[name])}
    assert calling == {"write_passing", "finish_one", "finish"}
    final = [file.stem for file in LUA if re.search(r"\bfinish\(", code(file))]
    assert final == ["bury", "cancel", "chain", "ends", "purge", "route", "settle"]


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE))
)
def test_no_python_sets_a_result(file: Path) -> None:
    """No program writes a result but by script: no call that writes names such a key."""
    text = file.read_text(encoding="utf-8")
    if "result(" not in text and "RESULT_PREFIX" not in text:
        return
    wrong = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        if any(_names_a_result(part) for part in given) and _called(node) not in READING | BESIDE:
            wrong.append((node.lineno, _called(node)))
    assert wrong == []


def _called(node: ast.Call) -> str:
    """Return the name of a call; of a command that is sent by its name, the command."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    first = node.args[0] if node.args else None
    if isinstance(first, ast.Constant) and isinstance(first.value, str) and first.value.isupper():
        return first.value
    return str(name)


def _names_a_result(node: ast.AST) -> bool:
    """Tell whether an argument is, or holds, a result's key: ``keys.result(...)`` or its prefix."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and part.attr == "RESULT_PREFIX":
            return True
        if isinstance(part, ast.Name) and part.id == "RESULT_PREFIX":
            return True
        if isinstance(part, ast.Call) and ast.unparse(part.func) == "keys.result":
            return True
    return False


def test_the_scan_covers_all_scripts() -> None:
    """The scripts lie where this test looks."""
    there = resources.files("gpuinfer.queue").joinpath("lua")
    assert {file.name for file in there.iterdir()} >= {file.name for file in LUA} > {"states.lua"}
