# SPDX-License-Identifier: Apache-2.0
"""Which roles may make which requests. Pure.

::

             health   look   submit   change tasks   manage
    nobody     yes      -       -          -            -
    read       yes     yes      -          -            -
    predict    yes     yes     yes        yes           -
    admin      yes     yes     yes        yes          yes

``access.Caller`` says whose tasks a caller may view and change. A route in none of the tables below is for
administrators only, so that a forgotten route is not open.
"""

from __future__ import annotations

import re
from typing import Literal

from gpuinfer.keys.key import Role

Verb = Literal["health", "look", "submit", "change", "manage"]

_HEALTH = ("/health/", "/v2/health/")
#: Verb -> its methods and paths.
_VERBS: dict[tuple[str, str], Verb] = {
    ("POST", "/predict"): "submit",
    ("POST", "/batch_predict"): "submit",
    # A POST that changes nothing.
    ("POST", "/v2/repository/index"): "look",
}
_PATTERNS: tuple[tuple[str, re.Pattern[str], Verb], ...] = (
    ("POST", re.compile(r"/v2/models/.+/infer"), "submit"),
    ("POST", re.compile(r"/models/[^/]+/predict"), "submit"),
    ("PUT", re.compile(r"/models/[^/]+/predict"), "submit"),
    ("PUT", re.compile(r"/tasks/[^/]+"), "submit"),
    ("POST", re.compile(r"/tasks/.+/(?:cancel|retry)", re.DOTALL), "change"),
    ("POST", re.compile(r"/cancel/.+", re.DOTALL), "change"),
    ("DELETE", re.compile(r"/tasks/.+", re.DOTALL), "change"),
)
#: Role -> verbs it may use.
_MAY: dict[Role, frozenset[Verb]] = {
    "read": frozenset({"health", "look"}),
    "predict": frozenset({"health", "look", "submit", "change"}),
    "admin": frozenset({"health", "look", "submit", "change", "manage"}),
}


def verb_of(method: str, path: str) -> Verb:
    """Return a request's verb. ``HEAD`` must be mapped to ``GET``, and the trailing slash removed."""
    if method == "GET" or method == "OPTIONS":
        return "health" if path.startswith(_HEALTH) else "look"
    verb = _VERBS.get((method, path))
    if verb is not None:
        return verb
    for known, pattern, verb in _PATTERNS:
        if known == method and pattern.fullmatch(path):
            return verb
    return "manage"


def may(role: Role, verb: Verb) -> bool:
    """Whether a role may do this."""
    return verb in _MAY[role]


def needed(verb: Verb) -> str:
    """Return the roles that may do this, as text."""
    return " or ".join(role for role, verbs in _MAY.items() if verb in verbs)
