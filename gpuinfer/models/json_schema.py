# SPDX-License-Identifier: Apache-2.0
"""Validation by a JSON schema: of the manifest, or made of annotations.

A front or a client has the schema from a worker, which runs models' code: so no code is made of it, nothing
that it refers to is fetched, and its patterns match in linear time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gpuinfer.errors import InputError

#: Takes a JSON value and the field to name in an error. Raises InputError; ValueError for what is no JSON.
Check = Callable[[Any, str], None]
#: Of a message no more is told.
_MOST_WORDS = 300


def checker(schema: Mapping[str, Any]) -> Check:
    """Return what validates by a schema. Raises ValueError for one that cannot be used, ImportError.

    Its errors name the place, and no value: they are logged.
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
