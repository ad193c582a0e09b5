# SPDX-License-Identifier: Apache-2.0
"""README's section "On a host", followed word by word on a bare Debian: each command, and what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.admin import logged
from tests.host.conftest import ROOT
from tests.host.container import Container
from tests.host.root import root

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
#: What differs from one host to another, and the pattern of each.
VOLATILE = re.compile(
    rf"({UUID})|(\b(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)\b)|(\b\d+s ago)|((?<![@\w])\d+(?:[,.]\d+)*)"
)
STANDS_FOR = ("", UUID, r"\w{3}", r"[\w ]+ ago", r"\d+(?:[,.]\d+)*")
#: The folder in which the commands are given.
CHECKOUT = "/home/someone/gpuinfer"


def steps() -> Iterator[tuple[str, str, list[str]]]:
    """Yield (prompt, command, lines of output) of the section's console block."""
    section = (ROOT / "README.md").read_text().split("\n## On a host\n", 1)[1].split("\n## ", 1)[0]
    block = section.split("```console\n", 1)[1].split("```", 1)[0]
    for step in re.split(r"(?m)^(?=[#$] )", block)[1:]:
        lines = step.splitlines()
        command = [lines.pop(0)[2:]]
        while "\n".join(command).count("'") % 2:  # a quoted text of several lines
            command.append(lines.pop(0))
        yield step[0], "\n".join(command), lines


def pattern(line: str) -> str:
    """Return a promised line as a pattern: other ids, times and numbers are right, too."""
    line, text, end = line.strip(), "", 0
    for found in VOLATILE.finditer(line):
        text += re.escape(line[end : found.start()]) + STANDS_FOR[found.lastindex or 0]
        end = found.end()
    text += re.escape(line[end:])
    # A line of the log may have more fields than the page has room for, with or without an ellipsis.
    return text.replace(r",\ ", r", (?:\w+=[^ ]+ )*").replace("…", ".*")


@pytest.fixture(scope="module")
def bare(debs: list[Path]) -> Iterator[Container]:
    """A Debian with nothing of ours but the two packages in dist/, and somebody who is not root."""
    with Container(root()) as host:
        host.ok(f"useradd -m someone; mkdir -p {CHECKOUT}/dist; chown someone {CHECKOUT}")
        for deb in debs:
            host.copy(deb, f"{CHECKOUT}/dist/")
        # apt asks whether to go on, and nobody is here to say yes.
        host.put("/etc/apt/apt.conf.d/90yes", 'APT::Get::Assume-Yes "true";\n')
        yield host


def test_what_the_readme_tells_is_so(bare: Container) -> None:
    """Every command succeeds, in order, as root (#) or as anybody ($), and says what is promised."""
    task_id, told = "", []
    for prompt, command, promised in steps():
        if task_id:
            bare.until(f"curl -s http://127.0.0.1:8080/result/{task_id} | grep -q completed")
            logged(bare, f"TASK_ID={task_id}", "ACTION=batch_done")
        bare.put("/tmp/step", f"cd {CHECKOUT}\n{re.sub(UUID, task_id, command) if task_id else command}\n")
        as_whom = "bash" if prompt == "#" else "runuser -u someone -- bash"
        said = bare.ok(f"{as_whom} /tmp/step", timeout=300)
        found = re.search(rf'"task_id": ?"({UUID})"', said)
        task_id = found[1] if found else task_id
        for line in promised:
            assert re.search(pattern(line), said), f"{command}\npromises\n{line}\nand says\n{said}"
        told.append(command.split()[0])
    assert told == ["apt", "systemctl", "systemctl", "echo", "curl", "gpuinfer", "gpuinfer"]
    assert task_id
