# SPDX-License-Identifier: Apache-2.0
"""What ``systemctl show`` prints, as dictionaries."""

from __future__ import annotations

import re


def read_units(shown: str) -> list[dict[str, str]]:
    """Return the properties of each unit; one that has several lines, as a socket's Listen, keeps them."""
    found: list[dict[str, str]] = []
    for block in re.split(r"\n\n+", shown.strip()):
        unit: dict[str, str] = {}
        for line in block.splitlines():
            key, _, value = line.partition("=")
            unit[key] = f"{unit[key]}\n{value}" if key in unit else value
        found += [unit] if unit else []
    return found
