# SPDX-License-Identifier: Apache-2.0
"""The options of a task: declared once, and the same for everybody who takes them."""

from __future__ import annotations

import inspect
import pydoc
from typing import Any

import pytest

from gpuinfer import AsyncClient, Client
from gpuinfer.api.admission import FIELDS
from gpuinfer.api.predict_schemas import PREDICT_BODY
from gpuinfer.client.cli import submit
from gpuinfer.client.submissions import build
from gpuinfer.errors import InputError
from gpuinfer.queue.options import ARGUMENTS, OPTIONS

pytestmark = pytest.mark.unit


def test_all_take_the_same_options() -> None:
    """Both clients, the HTTP body, its schema and the command line; the worker takes those of the task."""
    for cls in (Client, AsyncClient):
        for verb in ("submit", "submit_batch", "submit_many"):
            parameters = inspect.signature(getattr(cls, verb)).parameters.values()
            named = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
            assert named == list(OPTIONS), verb
    assert ("inputs", *OPTIONS) == FIELDS
    body = PREDICT_BODY["requestBody"]["content"]["application/json"]["schema"]["anyOf"][1]
    assert list(body["properties"]) == list(FIELDS)
    assert set(OPTIONS) <= {str(parameter.name) for parameter in submit.params}
    assert ARGUMENTS == ("inputs", "model", "top_k", "encoding")


@pytest.mark.parametrize("cls", [Client, AsyncClient])
def test_help_shows_them(cls: type) -> None:
    """`help(Client.submit)` names each with its type, its default and what it does."""
    text = pydoc.plain(pydoc.render_doc(cls.submit))  # type: ignore[attr-defined]  # both have it
    for name, option in OPTIONS.items():
        assert f"{name}: {option.help}" in text
    assert "priority: int = 0" in text


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model", "No@me", "a model's name"),
        ("model", 5, "a model's name"),
        ("queue", "urgent", "one of realtime, default, batch"),
        ("priority", 10, "an integer from 0 to 9"),
        ("priority", True, "an integer from 0 to 9"),
        ("priority", None, "an integer from 0 to 9"),
        ("top_k", 0, "an integer from 1"),
        ("top_k", 10**30, "an integer from 1"),
        ("encoding", "hex", "one of list, b64, raw"),
        ("expires_s", 0, "a number of seconds above 0"),
        ("time_limit_s", float("nan"), "a number of seconds above 0"),
        ("soft_time_limit_s", "5", "a number of seconds above 0"),
        ("ignore_result", 1, "true or false"),
        ("metadata", {"": "x"}, "an object of at most 16 texts"),
        ("metadata", {"a": 1}, "an object of at most 16 texts"),
        ("metadata", {"a": "\ud800"}, "an object of at most 16 texts"),
        ("metadata", {str(i): "" for i in range(17)}, "an object of at most 16 texts"),
        ("idempotency_key", "k" * 201, "a text of 1 to 200 characters"),
        ("idempotency_key", "", "a text of 1 to 200 characters"),
        ("prority", 1, "unknown option; known: model, queue"),
    ],
)
def test_what_cannot_work_is_named(name: str, value: Any, words: str) -> None:
    """The field, what it must be, and what came."""
    with pytest.raises(InputError, match=words) as caught:
        build([1], many=False, **{name: value})
    assert (caught.value.field, caught.value.http_status) == (name, 422)


def test_schemas_say_the_same() -> None:
    """What is refused is what the schema excludes."""
    assert OPTIONS["priority"].schema() | {"description": ""} == {
        "type": "integer",
        "minimum": 0,
        "maximum": 9,
        "default": 0,
        "description": "",
    }
    assert OPTIONS["idempotency_key"].schema()["maxLength"] == 200
    assert OPTIONS["model"].schema()["pattern"].startswith("^[a-z0-9]")
