# SPDX-License-Identifier: Apache-2.0
"""Validation by a JSON schema, from a manifest or made from annotations.

The API and clients get the schema from a worker, which runs models' code, so it is not trusted: it is not
compiled to code, nothing that it refers to is fetched, and its patterns match in linear time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gpuinfer.errors import InputError

#: Takes a JSON value and the field to name in an error. Raises InputError; ValueError if it is not JSON.
Check = Callable[[Any, str], None]
#: Maximum characters of the validator's message in an error.
_MOST_WORDS = 300


def checker(schema: Mapping[str, Any]) -> Check:
    """Return a function that validates values by a schema. Raises ValueError if it is unusable; ImportError.

    As its errors are logged, they tell where in the value the fault is, but no value.
    """
    import jsonschema_rs

    validator = jsonschema_rs.validator_for(
        dict(schema), mask="it", offline=True, pattern_options=jsonschema_rs.RegexOptions()
    )

    def check(value: Any, field: str) -> None:
        error = next(iter(validator.iter_errors(value)), None)
        if error is not None:
            where = ".".join((field, *(str(part)[:80] for part in error.instance_path)))
            raise InputError(f"does not fit what the model takes: {error.message[:_MOST_WORDS]}", where)

    return check
