# SPDX-License-Identifier: Apache-2.0
"""Format of the commands' help: examples on lines of their own, numbers with their unit."""

from __future__ import annotations

from typing import Any

import click

#: An upper bound that is not worth showing.
_ENDLESS = 2**31 - 1


def examples(*lines: str) -> str:
    """Return an epilog that shows each example on a line of its own."""
    return "\n".join(("\b", "Example:" if len(lines) == 1 else "Examples:", *(f"  {line}" for line in lines)))


def plain(command: click.Command) -> click.Command:
    """Make a command and its subcommands show units instead of types, and ranges in words; return it."""
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            _plain_option(parameter)
    if isinstance(command, click.Group):
        for below in command.commands.values():
            plain(below)
    return command


def _plain_option(option: click.Option) -> None:
    kind = option.type
    if isinstance(kind, click.IntRange) and not isinstance(kind, _Whole):
        option.type = _Whole(kind.min, kind.max, kind.min_open, kind.max_open, kind.clamp)
    elif isinstance(kind, click.FloatRange) and not isinstance(kind, _Any):
        option.type = _Any(kind.min, kind.max, kind.min_open, kind.max_open, kind.clamp)
    if option.metavar is not None or option.is_flag or option.count:
        return
    if isinstance(kind, click.IntRange) or kind is click.INT:
        option.metavar = "N"
    elif isinstance(kind, click.FloatRange) or kind is click.FLOAT:
        option.metavar = "SECONDS" if "second" in (option.help or "").lower() else "NUMBER"


def in_words(kind: Any) -> str:
    """Return the range of a click type in words."""
    low, high = kind.min, kind.max
    if high is not None and high >= _ENDLESS:
        high = None
    if low is None:
        return f"less than {high}" if kind.max_open else f"at most {high}"
    if high is None:
        return f"more than {low}" if kind.min_open else f"{low} or more"
    return f"more than {low}, at most {high}" if kind.min_open else f"{low} to {high}"


class _Whole(click.IntRange):
    def _describe_range(self) -> str:
        return in_words(self)


class _Any(click.FloatRange):
    def _describe_range(self) -> str:
        return in_words(self)
