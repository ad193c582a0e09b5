# SPDX-License-Identifier: Apache-2.0
"""The page that documents the API, and what it says of models."""

from __future__ import annotations

from typing import Any

import pytest

from gpuinfer.api.app import create_app
from gpuinfer.api.docs import with_models
from gpuinfer.api.docs_page import render
from gpuinfer.api.model_schemas import inputs_schema
from gpuinfer.api.shared import Shared
from gpuinfer.errors import InputError
from gpuinfer.models.json_schema import checker
from gpuinfer.models.signature import Input, Signature
from gpuinfer.settings import Settings

pytestmark = pytest.mark.unit

TENSOR = Input(name="x", kind="tensor", dtype="float32", shape=(-1, 2))
ENCODED = {"b64": "AAAA", "dtype": "float32", "shape": [1, 2]}


@pytest.mark.parametrize(
    ("signature", "right", "wrong"),
    [
        (Signature(inputs=(TENSOR,)), [[[1, 2.5]], [], ENCODED], [[[1]], [["a", 1]], {"b64": "A"}]),
        (Signature(inputs=(Input(name="n", kind="tensor", dtype="int64", shape=()),)), [3], [1.5, [3]]),
        (Signature(inputs=(Input(name="t", kind="text"),)), ["hello"], [5]),
        (Signature(inputs=(Input(name="j", schema={"type": "integer"}),)), [5], ["x"]),
        (Signature(inputs=(Input(name="i", kind="image"),)), [{"b64": "AA==", "name": "a.png"}], [[1]]),
        (
            Signature(inputs=(TENSOR, Input(name="t", kind="text")), named=True),
            [{"x": [[1, 2]], "t": "a"}],
            [{"x": [[1, 2]]}, [1], {"x": [], "t": "a", "y": 1}],
        ),
        (Signature(inputs=(), source="none"), [None, [1]], []),
    ],
)
def test_a_models_schema_takes_what_the_model_takes(
    signature: Signature, right: list[Any], wrong: list[Any]
) -> None:
    """A client that checks by it sends what is accepted."""
    check = checker(inputs_schema(signature))
    for value in right:
        check(value, "inputs")
    for value in wrong:
        with pytest.raises(InputError, match="does not fit what the model takes"):
            check(value, "inputs")


def test_the_page_has_all_routes_and_nothing_foreign() -> None:
    """Every documented route, each model's example, and no text of others as HTML."""
    spec = create_app(Shared(Settings())).openapi()
    signature = Signature(inputs=(Input(name="<b>", kind="text"),), example="</pre><script>alert(1)</script>")
    page = render(with_models(spec, {"m": signature}), {"m": signature}, "http://h/<x>", "/up/openapi.json")
    for path, methods in spec["paths"].items():
        for method in methods:
            assert f"<b>{method.upper()}</b>{path}</h3>" in page
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<td>&lt;b&gt;" in page
    assert "http://h/<x>" not in page
    assert 'data-path="/up/predict"' in page
