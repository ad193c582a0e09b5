# SPDX-License-Identifier: Apache-2.0
"""The broker's URL, read once: redis-py, kombu and Celery's results each know other options in it.

What all of them can do is taken; the rest is refused by name, before a worker would fail on it. No message
holds any part of a password, nor does ``masked``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

SCHEMES: Mapping[str, Literal["redis", "rediss", "unix"]] = {
    "redis": "redis",
    "rediss": "rediss",
    "unix": "unix",
    "redis+socket": "unix",
}
_ENCODE = "a password's special characters must be encoded: # as %23, / as %2F, ? as %3F, @ as %40, % as %25"
#: What redis-py would take from a URL and we do not, with what is right instead.
_INSTEAD = {
    "socket_connect_timeout": "set broker.connect_timeout_s",
    "ssl_ca_certs": "set broker.tls_ca",
    "ssl_cert_reqs": "the server's certificate is always checked",
    "ssl_check_hostname": "the server's certificate is always checked",
    "decode_responses": "leave it out",
    "socket_keepalive": "leave it out; it is on",
    "max_connections": "leave it out",
    "retry_on_timeout": "leave it out",
    "retry_on_error": "leave it out",
}


@dataclass(frozen=True, kw_only=True)
class RedisUrl:
    """Where Redis is. ``user`` and ``password`` are decoded; ``path`` is as it stands in the URL."""

    scheme: Literal["redis", "rediss", "unix"]
    host: str = "localhost"
    port: int = 6379
    path: str = ""
    db: int = 0
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    #: health_check_interval and socket_timeout in seconds, protocol (2 or 3), client_name.
    options: Mapping[str, int | float | str] = field(default_factory=dict)

    @property
    def netloc(self) -> str:
        """Host and port, as a URL has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def credentials(self, user: str | None = None, password: str | None = None) -> str:
        """Return ``user:password@``, encoded; '' without any. Those given come before the URL's own."""
        if password is None:
            user, password = self.user, self.password
        if not user and not password:
            return ""
        return f"{quote(user or '', safe='')}:{quote(password, safe='')}@"


def parse(url: str) -> RedisUrl:
    """Read a URL. Raises ValueError, which says what would be right and shows no credentials."""
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        raise ValueError("must begin with redis://, rediss:// or unix://")
    try:
        # Of an unknown scheme urlsplit would not look at the port and the host.
        parts = urlsplit(f"redis://{rest}")
    except ValueError:  # its words quote the place of the password
        raise ValueError(f"cannot be read as a URL; {_ENCODE}") from None
    given = _options(parts)
    db, user, password = (given.pop(name, "") for name in ("db", "username", "password"))
    kind = SCHEMES[scheme]
    if kind == "unix" and not parts.path.strip("/"):
        raise ValueError("must name a socket, as unix:///run/gpuinfer/redis/redis.sock does")
    return RedisUrl(
        scheme=kind,
        host=parts.hostname or "localhost",
        port=_port(parts),
        path=parts.path if kind == "unix" else "",
        db=_db(db or ("" if kind == "unix" else parts.path.strip("/"))),
        user=user or unquote(parts.username or ""),
        password=password or unquote(parts.password or ""),
        options={name: _OPTIONS[name](name, value) for name, value in given.items()},
    )


def masked(text: str) -> str:
    """Return a text without the passwords of the URL in it, be it well written or not."""
    # Up to the last @: a password may hold an @ or a slash of its own.
    text = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", text)
    # Without an @ what follows the colon is a port, or a password that was meant to be one.
    text = re.sub(r"(://(?!\[)[^:/?#@]*):(?!\*\*\*@)(?!\d*(?:[/?]|$)).*", r"\1:***", text)
    return re.sub(r"([?&]password=).*", r"\1***", text)


def _options(parts: SplitResult) -> dict[str, str]:
    """Return what follows the question mark."""
    if parts.fragment or "#" in parts.query or "@" in parts.path:
        raise ValueError(_ENCODE)
    found: dict[str, str] = {}
    secret = "password" in parts.query or "@" in parts.query
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        known = "db" if name == "virtual_host" else name
        if known not in _KNOWN:
            raise ValueError(_unknown(known, secret=secret))
        found[known] = value.strip("/") if known == "db" else value
    return found


def _unknown(name: str, *, secret: bool) -> str:
    """Say which option is none of ours; where it may be a piece of a password, do not name it."""
    if name in _INSTEAD:
        return f"must not have the option {name}: {_INSTEAD[name]}"
    which = "an option" if secret else f"the option {name!r:.40}"
    return f"has {which} that is not known; known: {', '.join(_KNOWN)}" + (f"; {_ENCODE}" if secret else "")


def _port(parts: SplitResult) -> int:
    try:
        return parts.port or 6379
    except ValueError:
        hint = f"; {_ENCODE}" if "@" not in parts.netloc else ""
        raise ValueError(f"must name a port from 1 to 65535 after the host's colon{hint}") from None


def _db(text: str) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdecimal()):
        raise ValueError("must name a database by its number, as redis://host:6379/0 does")
    return int(text)


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 86400:
        raise ValueError(f"option {name} must be a number of seconds above 0")
    return value


def _whole_seconds(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) > 86400:
        raise ValueError(f"option {name} must be a whole number of seconds; 0: never")
    return int(text)


def _protocol(_: str, text: str) -> int:
    if text not in ("2", "3"):
        raise ValueError("option protocol must be 2 or 3")
    return int(text)


def _name(name: str, text: str) -> str:
    if not re.fullmatch(r"[!-~]{1,100}", text):
        raise ValueError(f"option {name} must be 1 to 100 printable characters without spaces")
    return text


_OPTIONS: Mapping[str, Callable[[str, str], int | float | str]] = {
    "health_check_interval": _whole_seconds,
    "socket_timeout": _seconds,
    "protocol": _protocol,
    "client_name": _name,
}
_KNOWN = ("db", "username", "password", *_OPTIONS)
