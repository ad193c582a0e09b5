# SPDX-License-Identifier: Apache-2.0
"""Model code never runs as root: on an installed host a process of root first becomes the worker's user.

A model is a program. The units run it as their own user; this module is for ``gpuinfer worker N``,
``gpuinfer model run`` and ``gpuinfer demo`` started by root. The process cannot become root again: all its
ids change, no program that it starts gains rights, and it cannot write into the input of root's terminal
(TIOCSTI).
"""

from __future__ import annotations

import ctypes
import os
import platform
import pwd
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

from gpuinfer.errors import RootKept

WORKER_USER = "gpuinfer-worker"
#: The unit's CacheDirectory=, where libraries may store compiled code.
CACHE = Path("/var/cache/gpuinfer/worker")

_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 2, 38
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM
#: ioctls that put characters into a terminal's input, where root's shell would run them.
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
#: Machine -> AUDIT_ARCH_*, and the numbers of ioctl(2) and seccomp(2).
_MACHINES = {"x86_64": (0xC000003E, 16, 317), "aarch64": (0xC00000B7, 29, 277)}
#: The first number of the x32 system calls on x86-64.
_X32 = 0x40000000


def worker_user() -> pwd.struct_passwd | None:
    """Return the user the worker units run as, None where the package is not installed."""
    try:
        return pwd.getpwnam(WORKER_USER)
    except KeyError:
        return None


def leave_root(warn: Callable[[str], object]) -> None:
    """Become the worker's user if this process is root. ``warn`` is called where there is no such user.

    Raises RootKept where the user cannot be changed.
    """
    if os.geteuid() != 0:
        return
    warn_root(warn)
    user = worker_user()
    if user is not None:
        _become(user)


@cache
def warn_root(warn: Callable[[str], object]) -> None:
    """Call ``warn`` once where model code runs as root, because there is no user for it."""
    if os.geteuid() == 0 and worker_user() is None:
        warn(f"model code runs as root: this host has no user {WORKER_USER}, which the package creates")


def _become(user: pwd.struct_passwd) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    parent, signal = os.getppid(), ctypes.c_int(0)
    libc.prctl(_PR_GET_PDEATHSIG, ctypes.byref(signal))
    try:
        os.initgroups(user.pw_name, user.pw_gid)
        os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
        os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)  # of all threads; the capabilities go with it
        _refuse_terminal_input(libc)
    except OSError as exc:
        raise RootKept(f"cannot become {user.pw_name}, and model code does not run as root: {exc}") from exc
    if not os.access(__file__, os.R_OK):
        raise RootKept(f"{user.pw_name}, who runs model code, cannot read {Path(__file__).parent}")
    if signal.value:  # the kernel forgets it with the change, and our parent may have died meanwhile
        libc.prctl(_PR_SET_PDEATHSIG, signal.value)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.value)
    os.umask(0o077)
    home = str(CACHE if CACHE.is_dir() else Path(user.pw_dir))
    os.environ.update(HOME=home, USER=user.pw_name, LOGNAME=user.pw_name)
    for name in [name for name in os.environ if name.startswith("XDG_")]:
        del os.environ[name]


def _refuse_terminal_input(libc: ctypes.CDLL) -> None:
    """Forbid all threads to gain rights, and to write into the terminal's input. Raises OSError."""
    arch, ioctl, seccomp = _MACHINES[platform.machine()]
    load, jump_eq, jump_ge, answer = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, JMP|JEQ|K, JMP|JGE|K, RET|K
    program = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (jump_eq, 0, 6, arch),
        (load, 0, 0, 0),  # .nr
        (jump_ge, 4, 0, _X32),
        (jump_eq, 0, 4, ioctl),
        (load, 0, 0, 24),  # the lower half of .args[1]: the kernel looks at no more
        (jump_eq, 1, 0, _TIOCSTI),
        (jump_eq, 0, 1, _TIOCLINUX),
        (answer, 0, 0, _REFUSE),
        (answer, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    filter_ = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    if libc.syscall(seccomp, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, ctypes.byref(filter_)):
        raise OSError(ctypes.get_errno(), "seccomp")
