# SPDX-License-Identifier: Apache-2.0
"""Errors as they travel: from a worker through JSON to the caller."""

from __future__ import annotations

import orjson
import pytest

from gpuinfer.errors import InputError, from_dict

pytestmark = pytest.mark.unit


def test_whatever_a_text_holds_it_goes_into_json() -> None:
    """A half surrogate, as JSON from outside may have in a name, is escaped; field and message alike."""
    error = InputError("got '\ud800é'", "inputs.\udfff")
    body = orjson.loads(orjson.dumps(error.to_dict()))
    assert body == {"code": "bad_input", "message": "got '\\ud800é'", "field": "inputs.\\udfff"}
    again = from_dict(body)
    assert (type(again), again.args) == (InputError, error.args)
