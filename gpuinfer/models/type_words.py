# SPDX-License-Identifier: Apache-2.0
"""Words for the types of JSON values, for errors, which are logged and so must not contain the values."""

from __future__ import annotations

WORDS: dict[type, str] = {
    bool: "true or false",
    str: "a string",
    type(None): "null",
    float: "a fractional number",
    int: "a number",
    dict: "an object",
    list: "a list",
}


def word(value: object) -> str:
    """Return the word for a value's type."""
    return WORDS.get(type(value), f"a {type(value).__name__}")
