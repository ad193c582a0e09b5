# SPDX-License-Identifier: Apache-2.0
"""The text of a Lua script: whole, and with nothing in it that each call would pay for without a use."""

from __future__ import annotations

import re
from importlib import resources
from typing import get_args

import pytest

from gpuinfer.queue import scripts

_STRING = re.compile(r"'[^'\n]*'")
_DEFINED = re.compile(r"^local (?:function (\w+)|(?!function)(\w+(?:, \w+)*))", re.MULTILINE)


def names() -> set[str]:
    """Return what the libraries and scripts define."""
    found = set()
    for file in resources.files(scripts.__package__).joinpath("lua").iterdir():
        for function, variables in _DEFINED.findall(file.read_text()):
            found |= {function} if function else set(variables.split(", "))
    return found


@pytest.mark.parametrize("script", get_args(scripts.Name))
def test_a_script_has_what_it_uses(script: scripts.Name) -> None:
    """A name that a library defines is defined in front of its first use: Redis finds out in a call."""
    text = _STRING.sub("''", scripts.source(script))
    missing = []
    for name in names():
        use = re.search(rf"(?<![\w.:]){name}\b(?! = )", text)
        defined = re.search(
            rf"local function {name}\b|local [^=\n]*\b{name}\b|function \w*\([^)\n]*\b{name}\b"
            rf"|for [^\n]*\b{name}\b[^\n]* (?:in|do)\b|for {name} = ",
            text,
        )
        if use and (not defined or defined.start() > use.start()):
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize("script", get_args(scripts.Name))
def test_names_of_keys_are_written_out(script: scripts.Name) -> None:
    """A constant is no variable, which each call would set, and each function would hold."""
    text = _STRING.sub("''", scripts.source(script))
    assert [name for name in scripts._CONSTANTS if re.search(rf"\b{name}\b", text)] == []


def test_what_few_calls_need_is_made_by_these_alone() -> None:
    """A task without an idempotency key or an ETA, a settlement with nothing that follows."""
    outside = r"^local function {}\("
    for script, inner in (("submit", "holder_of"), ("submit", "put_later"), ("settle", "follow")):
        found = scripts.source(script)
        begin = re.search(outside.format(inner), found, re.MULTILINE)
        block = re.search(r"^if ", found, re.MULTILINE)
        assert begin and block and begin.start() > block.start()
    assert "local function wake_for" not in scripts.source("begin")
