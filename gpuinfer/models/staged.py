# SPDX-License-Identifier: Apache-2.0
"""A tensor model's items and outputs while they are being copied to the device and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from gpuinfer.models.copies import Arrival
from gpuinfer.models.tensors import Array, Item


@dataclass(frozen=True, slots=True)
class Brought:
    """The arguments of one call of a module: tensors and plain numbers.

    ``sent``: the positions of those that are being copied (their values here are None), in the order of
    ``arrival``.
    """

    values: list[Any]
    sent: Sequence[int] = ()
    arrival: Arrival | None = None


@dataclass(slots=True)
class Staged(Sequence[Item]):
    """Items whose tensors are being copied to the device. A slice of them is plain items."""

    items: Sequence[Item]
    #: The positions of items that run together, and their arguments.
    groups: list[tuple[Sequence[int], Brought]] = field(default_factory=list)

    def take(self) -> list[tuple[Sequence[int], Brought]]:
        """Return the groups, and forget them: after the run they must not use the device's memory."""
        groups, self.groups = self.groups, []
        return groups

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, place: int) -> Item: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Item]: ...

    def __getitem__(self, place: int | slice) -> Item | Sequence[Item]:
        return self.items[place]


class Coming(tuple[Array, ...]):
    """One item's outputs, which may be read once ``event`` has happened."""

    event: Any = None

    @classmethod
    def of(cls, arrays: Sequence[Array], event: Any) -> Coming:
        """Return arrays that are being copied."""
        coming = cls(arrays)
        coming.event = event
        return coming
