# SPDX-License-Identifier: Apache-2.0
"""How the last start of a unit ended, and what it said then in the journal."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

#: What is asked of systemctl show.
PROPERTIES = "Id,Result,InvocationID,ExecMainCode,ExecMainStatus"
#: ExecMainCode: the main process exited; a signal ended it (CLD_EXITED; CLD_KILLED and CLD_DUMPED).
EXITED, _KILLED = "1", ("2", "3")
_MOST = 300


def last_words(
    run: Callable[[Sequence[str]], subprocess.CompletedProcess[str]], unit: Mapping[str, str]
) -> str:
    """Return ``(RESULT): WORDS``: the signal that ended it, and its own last error or line, else systemd's.

    Only lines of the last start count: an error of an earlier one may be fixed since. ``-u`` alone
    would find systemd's "Failed to start", which is always the last and tells nothing.
    """
    start, said = unit.get("InvocationID", ""), []
    own = f"_SYSTEMD_INVOCATION_ID={start}" if start else f"_SYSTEMD_UNIT={unit['Id']}"
    matches = [[own, "-p", "err"], [own], ["-u", unit["Id"], "-p", "warning"]]
    if unit.get("ExecMainCode") in _KILLED:
        said.append(f"killed by {signal.Signals(int(unit['ExecMainStatus'])).name}")
        del matches[1:]  # no other line of its own, and none of systemd's, has the cause
    for match in matches:
        done = run(["journalctl", "-b", *match, "-o", "cat", "-n", "1", "--no-pager", "-q"])
        if done.stdout.strip():
            said.append(done.stdout.strip().splitlines()[-1][:_MOST])
            break
    return f"({unit.get('Result', 'unknown')}): {'; '.join(said) or 'the journal has no line of it'}"
