# SPDX-License-Identifier: Apache-2.0
"""What each request does, which roles may do it, and what of an error is told to whom."""

from __future__ import annotations

import re

import pytest

from gpuinfer.api import front
from gpuinfer.api.app import create_app
from gpuinfer.api.oip import routes
from gpuinfer.api.public import plain, told
from gpuinfer.api.rights import Verb, may, needed, verb_of
from gpuinfer.api.shared import Shared
from gpuinfer.errors import BrokerUnavailable, ConfigError, InferenceError, QueueFull
from gpuinfer.settings import Settings

pytestmark = pytest.mark.unit

#: Each route whose verb is not "look", written out; what is not here, and no GET, is for administrators.
EXPECTED: dict[str, Verb] = {
    "POST /predict": "submit",
    "POST /batch_predict": "submit",
    "POST /models/{model}/predict": "submit",
    "PUT /models/{model}/predict": "submit",
    "PUT /tasks/{task_id}": "submit",
    "POST /v2/models/{model}/infer": "submit",
    "POST /v2/models/{model}/versions/{version}/infer": "submit",
    "POST /cancel/{task_id}": "change",
    "POST /tasks/{task_id}/cancel": "change",
    "POST /tasks/{task_id}/retry": "change",
    "DELETE /tasks/{task_id}": "change",
    "POST /v2/repository/index": "look",
    "POST /v2/repository/models/{model}/load": "manage",
    "POST /v2/repository/models/{model}/unload": "manage",
    "GET /health/live": "health",
    "GET /health/ready": "health",
    "GET /v2/health/live": "health",
    "GET /v2/health/ready": "health",
}


def all_routes() -> set[str]:
    """Return ``METHOD /path`` of each route there is."""
    documented = create_app(Shared(Settings())).openapi()["paths"]
    found = {f"{method.upper()} {path}" for path, methods in documented.items() for method in methods}
    found |= {f"{method} {path}" for method, path in front.ROUTES}
    found |= {f"{method} {_readable(pattern)}" for method, pattern, _ in front.PATTERNS}
    return found | {f"{method} {_readable(pattern)}" for method, pattern, _ in routes.ROUTES}


def _readable(pattern: re.Pattern[str]) -> str:
    return re.sub(r"\(.*\)", "{x}", pattern.pattern)


def test_every_route_has_the_verb_that_is_written_here() -> None:
    """A new route that looks is a GET; any other one is entered here and there."""
    named = {re.sub(r"\{\w+\}", "{x}", one): verb for one, verb in EXPECTED.items()}
    for route in sorted(all_routes()):
        method, path = route.split(" ", 1)
        path = re.sub(r"\{\w+(:\w+)?\}", "{x}", path)
        wanted = named.get(f"{method} {path}", "look" if method == "GET" else "?")
        if "infer" in path or "repository" in path or path.startswith("/v2/models"):
            continue  # by name below: their patterns are no paths
        assert verb_of(method, path.replace("{x}", "some-thing")) == wanted, route


@pytest.mark.parametrize("route", EXPECTED)
def test_the_verbs_of_all_that_changes_something(route: str) -> None:
    """Ids may hold slashes, and models' names dots."""
    method, path = route.split(" ", 1)
    assert verb_of(method, re.sub(r"\{\w+\}", "a.b-c", path)) == EXPECTED[route]
    if "/tasks/{task_id}/" in path or method == "DELETE":
        assert verb_of(method, path.replace("{task_id}", "cam1/frame\n7")) == EXPECTED[route]


@pytest.mark.parametrize(
    "request_line",
    [
        "PATCH /predict",
        "POST /nowhere",
        "DELETE /models/x",
        "PUT /predict",
        "POST /tasks/x",
        "BREW /",
        "POST /v2",
    ],
)
def test_what_is_not_known_is_for_administrators(request_line: str) -> None:
    """A route that is forgotten is closed."""
    method, path = request_line.split(" ", 1)
    assert verb_of(method, path) == "manage"


def test_roles() -> None:
    """The table of the module."""
    verbs: tuple[Verb, ...] = ("health", "look", "submit", "change", "manage")
    assert [may("read", verb) for verb in verbs] == [True, True, False, False, False]
    assert [may("predict", verb) for verb in verbs] == [True, True, True, True, False]
    assert all(may("admin", verb) for verb in verbs)
    assert needed("submit") == "predict or admin"
    assert needed("manage") == "admin"


# -- what is told ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "OSError: '/var/lib/gpuinfer/models/x/w.bin' (model.py, line 4)",
            "OSError: '…/w.bin' (model.py, line 4)",
        ),
        ("cannot open /etc/passwd", "cannot open …/passwd"),
        ("no folder /opt/models/: x", "no folder …/models/: x"),
        ("two /a/b and /c/d/e", "two …/b and …/e"),
        ("Redis at unix:///run/gpuinfer/redis.sock?db=0 is away", "Redis at … is away"),
        ("Redis at redis://:secret@10.0.0.1:6379/0, away", "Redis at …, away"),
        ("files go to /predict one by one; see https://a.b/c/d", None),
        ("1/2 of a/b/c and/or 3 // 4", None),
        ("there is no /v2/foo/bar; see", None),
        (
            'bad\nTraceback (most recent call last):\n  File "/a/b.py", line 3\nValueError: 5',
            "bad: ValueError: 5",
        ),
        ("Traceback (most recent call last):\n  boom", "boom"),
        (
            "sizes differ\nException raised from f at /pytorch/a.cpp:3 (most recent call first):\n#0: x",
            "sizes differ",
        ),
        ("", None),
    ],
)
def test_nothing_of_the_host_is_told(text: str, wanted: str | None) -> None:
    """Folders, addresses and traces go; URLs, fractions and the request's own path stay."""
    found = plain(text, "/v2/foo/bar")
    assert found == (text if wanted is None else wanted)


def test_what_is_wrong_with_redis_is_told_without_its_words() -> None:
    """That the queue is full is for the caller."""
    for error in (BrokerUnavailable("connecting to gpu7:6379 failed"), ConfigError("users.acl, line 3")):
        body = told(error)
        assert body == {
            "code": error.code,
            "message": "the queue is unavailable; see this server's log",
        }
    assert told(QueueFull("10 tasks wait"))["message"] == "10 tasks wait"
    assert told(InferenceError("/a/b/c", "inputs")) == {
        "code": "inference_failed",
        "message": "…/c",
        "field": "inputs",
    }
