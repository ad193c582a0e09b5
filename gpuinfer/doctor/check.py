# SPDX-License-Identifier: Apache-2.0
"""What a check is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from gpuinfer.doctor.finding import Findings
from gpuinfer.doctor.host import Host

#: How long a check may take, unless it says otherwise.
LIMIT_S = 20.0


@dataclass(frozen=True)
class Check:
    """One thing to look at. Its first docstring line says what holds on a sound host."""

    #: topic.name; the topic alone chooses all of its checks.
    name: str
    run: Callable[[Host], Findings]
    limit_s: float = LIMIT_S
    #: Takes seconds: left out by --quick.
    slow: bool = False

    @property
    def help(self) -> str:
        return (inspect.getdoc(self.run) or "").partition("\n")[0]
