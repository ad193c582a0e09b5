# SPDX-License-Identifier: Apache-2.0
"""Load by wrk: how many requests a second, and how long they take."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.services import ServiceError

_SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "{content_type}"
local file = io.open("{body}", "rb")
wrk.body = file:read("*a")
file:close()
done = function(summary, latency)
  local errors = summary.errors
  local lost = errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format(
    '{{"requests": %d, "duration_us": %d, "refused": %d, "lost": %d, "p50_us": %d, "p99_us": %d}}\\n',
    summary.requests, summary.duration, errors.status, lost,
    latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one run of wrk has measured."""

    requests: int
    duration_us: int
    #: Answers of 400 and more, and requests without an answer.
    refused: int
    lost: int
    p50_us: int
    p99_us: int

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.duration_us * 1e6


def load(
    url: str,
    body: bytes,
    connections: int,
    seconds: int,
    folder: Path,
    content_type: str = "application/json",
) -> Load:
    """Send a body over so many connections for a while. Raises ServiceError without wrk, or for errors."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise ServiceError("there is no wrk; apt-get install wrk")
    (folder / "body.json").write_bytes(body)
    (folder / "post.lua").write_text(_SCRIPT.format(body=folder / "body.json", content_type=content_type))
    command = [wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"]
    command += ["-s", str(folder / "post.lua"), url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServiceError(f"{url}: {done.stderr.strip() or done.stdout.strip()}")
    out = done.stdout
    found = Load(**json.loads(out.strip().splitlines()[-1]))
    if found.refused or found.lost or not found.requests:
        raise ServiceError(f"{url}: {found}")
    return found
