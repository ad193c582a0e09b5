# SPDX-License-Identifier: Apache-2.0
"""Files of variables as systemd reads them for a unit's ``EnvironmentFile=``: the one reader of them.

It follows systemd 252's ``parse_env_file_internal`` (src/basic/env-file.c) and what systemd.exec(5) says:
quotes, backslashes, comments and continued lines are taken as systemd takes them, and what systemd drops is
dropped here, and named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import ClassVar

_SPACE, _END, _COMMENT = " \t\n\r", "\n\r", "#;"
#: What a backslash keeps literal between double quotes; before anything else it stays.
_ESCAPED = '"\\`$'
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class EnvFile:
    """What such a file gives."""

    variables: Mapping[str, str] = field(default_factory=dict)
    #: What is odd, line by line: what systemd drops, and a quote that nothing closes.
    remarks: tuple[str, ...] = ()


def read(path: Path) -> EnvFile:
    """Read a file; one that is not there gives nothing, as after ``EnvironmentFile=-``.

    Raises OSError. A file that is no UTF-8 text gives nothing: systemd passes over it as a whole.
    """
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        return EnvFile()
    except UnicodeDecodeError as exc:
        return EnvFile(remarks=(f"must be UTF-8 text, byte {exc.start} is not: systemd ignores all of it",))
    if "\0" in text:
        return EnvFile(remarks=("must be text, it holds a NUL: systemd ignores all of it",))
    return parse(text)


class _State(Enum):
    BEFORE_NAME = auto()
    NAME = auto()
    #: After the equals sign, and after a closing quote.
    BEFORE_VALUE = auto()
    VALUE = auto()
    VALUE_ESCAPE = auto()
    SINGLE = auto()
    DOUBLE = auto()
    DOUBLE_ESCAPE = auto()
    COMMENT = auto()
    COMMENT_ESCAPE = auto()


def parse(text: str) -> EnvFile:
    """Read the text of such a file."""
    reader = _Reader()
    for character in text:
        reader.take(character)
    reader.finish()
    return EnvFile(reader.variables, tuple(reader.remarks))


class _Reader:
    def __init__(self) -> None:
        self.variables: dict[str, str] = {}
        self.remarks: list[str] = []
        self._state = _State.BEFORE_NAME
        self._line = self._began = 1
        self._name: list[str] = []
        self._value: list[str] = []
        #: How much of the value is kept whatever spaces end it.
        self._kept = 0

    def take(self, character: str) -> None:
        self._STEPS[self._state](self, character)
        self._line += character == "\n"

    def finish(self) -> None:
        """Take the end of the text for the end of the line."""
        if self._state is _State.NAME:
            self._refuse()
        elif self._state not in (_State.BEFORE_NAME, _State.COMMENT, _State.COMMENT_ESCAPE):
            if self._state in (_State.SINGLE, _State.DOUBLE, _State.DOUBLE_ESCAPE):
                self.remarks.append(
                    f"line {self._began} has a quote that nothing closes: all after it is its value"
                )
            self._assign()

    def _before_name(self, character: str) -> None:
        if character in _COMMENT:
            self._state = _State.COMMENT
        elif character not in _SPACE:
            self._state, self._began = _State.NAME, self._line
            self._name, self._value, self._kept = [character], [], 0

    def _in_name(self, character: str) -> None:
        if character in _END:
            self._refuse()
        elif character == "=":
            self._state = _State.BEFORE_VALUE
        else:
            self._name.append(character)

    def _before_value(self, character: str) -> None:
        opening = {"'": _State.SINGLE, '"': _State.DOUBLE, "\\": _State.VALUE_ESCAPE}
        self._kept = len(self._value)
        if character in _END:
            self._assign()
        elif character in opening:
            self._state = opening[character]
        elif character not in _SPACE:
            self._state = _State.VALUE
            self._add(character)

    def _in_value(self, character: str) -> None:
        if character in _END:
            self._assign()
        elif character == "\\":
            self._state, self._kept = _State.VALUE_ESCAPE, len(self._value)
        else:
            self._value.append(character)
            if character not in _SPACE:
                self._kept = len(self._value)

    def _value_escape(self, character: str) -> None:
        self._state = _State.VALUE
        if character not in _END:
            self._add(character)

    def _single(self, character: str) -> None:
        if character == "'":
            self._state = _State.BEFORE_VALUE
        else:
            self._add(character)

    def _double(self, character: str) -> None:
        if character == '"':
            self._state = _State.BEFORE_VALUE
        elif character == "\\":
            self._state = _State.DOUBLE_ESCAPE
        else:
            self._add(character)

    def _double_escape(self, character: str) -> None:
        self._state = _State.DOUBLE
        if character != "\n":
            self._add(character if character in _ESCAPED else "\\" + character)

    def _comment(self, character: str) -> None:
        if character == "\\":
            self._state = _State.COMMENT_ESCAPE
        elif character in _END:
            self._state = _State.BEFORE_NAME

    def _comment_escape(self, _: str) -> None:
        self._state = _State.COMMENT  # a backslash continues a comment, too

    def _add(self, text: str) -> None:
        self._value.append(text)
        self._kept = len(self._value)

    def _refuse(self) -> None:
        self._state = _State.BEFORE_NAME
        self.remarks.append(f"line {self._began} is no NAME=value: systemd ignores it")

    def _assign(self) -> None:
        self._state = _State.BEFORE_NAME
        name, value = "".join(self._name).rstrip(_SPACE), "".join(self._value[: self._kept])
        if not _NAME.fullmatch(name):
            words = "; leave out the word export" if name.startswith("export ") else ""
            self.remarks.append(
                f"line {self._began} has no name that a variable may have: systemd ignores it{words}"
            )
        else:
            self.variables[name] = value

    _STEPS: ClassVar[Mapping[_State, Callable[[_Reader, str], None]]] = {
        _State.BEFORE_NAME: _before_name,
        _State.NAME: _in_name,
        _State.BEFORE_VALUE: _before_value,
        _State.VALUE: _in_value,
        _State.VALUE_ESCAPE: _value_escape,
        _State.SINGLE: _single,
        _State.DOUBLE: _double,
        _State.DOUBLE_ESCAPE: _double_escape,
        _State.COMMENT: _comment,
        _State.COMMENT_ESCAPE: _comment_escape,
    }
