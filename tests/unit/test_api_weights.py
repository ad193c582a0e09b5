# SPDX-License-Identifier: Apache-2.0
"""The front tells Redis the weights of its keys: when they change, and again, as Redis may have lost them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpuinfer.api import app
from gpuinfer.errors import BrokerUnavailable
from gpuinfer.keys.folder import KeyFolder
from gpuinfer.keys.key import Key, serialise

pytestmark = pytest.mark.unit


class Client:
    """Notes what it is told; the first time Redis is away."""

    def __init__(self) -> None:
        self.told: list[dict[str, float]] = []
        self.enough = asyncio.Event()

    async def weigh(self, weights: Mapping[str, float]) -> None:
        self.told.append(dict(weights))
        if len(self.told) == 1:
            raise BrokerUnavailable("away")
        if len(self.told) == 4:
            self.enough.set()


async def test_weights_are_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What did not reach Redis is told at the next look, what did after a while."""
    monkeypatch.setattr(app, "CHECK_EVERY_S", 0.0)
    monkeypatch.setattr(app, "WEIGH_EVERY_S", 0.0)
    for name, weight in (("heavy", 3), ("usual", 1)):
        key = Key(name=name, sha256=f"{weight}" * 64, weight=weight)
        (tmp_path / f"{name}.toml").write_text(serialise(key))
    client = Client()
    shared: Any = SimpleNamespace(keys=KeyFolder(tmp_path), client=client)
    watching = asyncio.create_task(app.watch_keys(shared))
    await asyncio.wait_for(client.enough.wait(), 60)
    watching.cancel()
    assert client.told[:4] == [{"heavy": 3.0}] * 4
