# SPDX-License-Identifier: Apache-2.0
"""What happens to workers in a simulation: failures, and what an administrator does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from gpuinfer.errors import InputError

#: - fail: it ends, and each start of it fails until recover
#: - stop, start: by hand
#: - mask, unmask: as systemctl does
What = Literal["fail", "recover", "stop", "start", "mask", "unmask"]
WHATS: tuple[What, ...] = get_args(What)


@dataclass(frozen=True, slots=True, order=True)
class Event:
    """Something that happens to one worker."""

    second: float
    what: What
    gpu: int


def parse(text: str, gpus: int) -> Event:
    """Return the event that ``SECOND:WHAT:GPU`` describes, such as ``600:fail:0``. Raises InputError."""
    second, _, rest = text.partition(":")
    word, _, gpu = rest.partition(":")
    what = next((one for one in WHATS if one == word), None)
    try:
        at = float(second)
    except ValueError:
        at = -1.0
    if what is None or not 0 <= at <= 1e7 or not (gpu.isdecimal() and int(gpu) < gpus):
        hint = f"SECOND:WHAT:GPU, with what one of {', '.join(WHATS)}, and a GPU from 0 to {gpus - 1}"
        raise InputError(f"{text!r} is no event; one is {hint}", "--event")
    return Event(at, what, int(gpu))
