# SPDX-License-Identifier: Apache-2.0
"""Send entries to journald by its native protocol, one datagram per entry, without ever blocking.

The protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/. An entry that does not fit into a datagram is
sent as a sealed memfd. No line waits for a journal that is slow or stopped: when the kernel's buffer is
full, entries are dropped and counted, and the count is logged as soon as there is space. Only a process that
ends waits, for a second at most, until its entries are read.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

#: Levels of syslog, for ``say``.
ERROR, WARNING, INFO = 3, 4, 6
SOCKET = Path("/run/systemd/journal/socket")
#: Bytes of entries in the kernel's buffer; the kernel limits it to net.core.wmem_max.
BUFFER_BYTES = 8 * 1024 * 1024
#: A larger entry is sent as a memory file. It takes 45 us more, but almost none of that buffer: with Debian's
#: wmem_max 27 lines of 256 tasks (0.4 s) would fill it, while hundreds of files can wait.
DATAGRAM_BYTES = 8 * 1024
#: Seconds that a process that ends waits for the journal to read its entries.
READ_S = 1.0
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
#: The journal's buffer is full, or this process has no descriptor left for a large entry.
_NO_ROOM = (
    *(errno.EAGAIN, errno.EMSGSIZE, errno.ENOBUFS, errno.ENOMEM),
    *(errno.ETOOMANYREFS, errno.EMFILE, errno.ENFILE),
)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def field(name: str, value: str) -> bytes:
    """Return one field in the protocol's form; a value of several lines is preceded by its length."""
    raw = value.encode("utf-8", "backslashreplace")
    if b"\n" not in raw:
        return b"%s=%s\n" % (name.encode(), raw)
    return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(raw)), raw)


def is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Tell whether a stream goes to the journal: systemd names its stream in ``JOURNAL_STREAM``."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def say_error(text: str) -> None:
    """Write the error that ends a command to stderr.

    Without a level, ``journalctl -p warning`` would show that a unit failed, but not why.
    """
    say(f"gpuinfer: error: {text}", ERROR)


def say_warning(text: str) -> None:
    """Write a warning to stderr."""
    say(f"gpuinfer: warning: {text}", WARNING)


def say(text: str, level: int) -> None:
    """Write a line to stderr; in the journal it has this level (sd-daemon(3))."""
    prefix = f"<{level}>" if is_journal(sys.stderr, os.environ) else ""
    sys.stderr.write(f"{prefix}{text}\n")
    sys.stderr.flush()


class Sender:
    """Sends encoded entries. It is not thread-safe: the log handler's lock protects it.

    ``report`` makes the entry that says how many were dropped.
    """

    def __init__(self, report: Callable[[int], bytes], path: Path | None = None) -> None:
        self._report = report
        self._path = str(path or SOCKET)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        #: Entries lost since the last report.
        self.dropped = 0

    def flush(self) -> None:
        """Wait until the journal has read all entries, for ``READ_S`` at most. Called when the process ends.

        The journal asks /proc for an entry's unit when it reads the entry: of a process that is gone by then,
        ``journalctl -u`` would not show why its start failed.
        """
        end = time.monotonic() + READ_S
        while self._unread() and time.monotonic() < end:
            time.sleep(0.002)

    def _unread(self) -> bool:
        """Tell whether entries are in the kernel's buffer (SIOCOUTQ, the same number as TIOCOUTQ)."""
        return fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)) != bytes(4)

    def close(self) -> None:
        """Report dropped entries, if that is possible now, and close the socket."""
        self._catch_up()
        self._socket.close()

    def send(self, entry: bytes) -> bool:
        """Send an entry, or drop and count it. Returns False when there is no journal to send to."""
        outcome = self._try(entry) if self._catch_up() else errno.EAGAIN
        if outcome in _NO_ROOM:
            self.dropped += 1
        return outcome == 0 or outcome in _NO_ROOM

    def _catch_up(self) -> bool:
        """Report dropped entries. Returns False when there is no space even for that."""
        if self.dropped:
            outcome = self._try(self._report(self.dropped))
            if outcome == 0:
                self.dropped = 0
            return outcome not in _NO_ROOM
        return True

    def _try(self, entry: bytes) -> int:
        """Send an entry; return 0 or the error's number. The path is resolved each time."""
        try:
            if len(entry) > DATAGRAM_BYTES:
                self._send_file(entry)
            else:
                self._socket.sendto(entry, _FLAGS, self._path)
        except OSError as exc:
            return exc.errno or errno.EIO
        return 0

    def _send_file(self, entry: bytes) -> None:
        """Send an entry as a sealed memory file; journald maps it, and accepts no other."""
        with os.fdopen(
            os.memfd_create("gpuinfer-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb"
        ) as file:
            file.write(entry)
            file.flush()
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", file.fileno()))
            self._socket.sendmsg([], [rights], _FLAGS, self._path)
