# SPDX-License-Identifier: Apache-2.0
"""Documentation for ``/docs`` of the fast routes, which ``front`` serves."""

from __future__ import annotations

from fastapi import APIRouter

from gpuinfer.api import predict_schemas
from gpuinfer.api.elsewhere import document

predict = APIRouter(tags=["predict"])
document(
    predict,
    "POST",
    "/predict",
    "Submit one input",
    predict_schemas.SUBMIT_RESPONSES,
    """Queue one input. The body is the input, or an object with the input and options.

To send a file, use it as the body with options in the URL, or a form with the file and options. With
`Prefer: wait=5` or `?wait=5`, the answer is 200 with the task if it ends in time, even if it fails.""",
    status=202,
    extra=predict_schemas.PREDICT_BODY,
)
for _method in ("POST", "PUT"):  # PUT is what curl -T sends
    document(
        predict,
        _method,
        "/models/{model}/predict",
        "Submit one input to a model",
        predict_schemas.SUBMIT_RESPONSES,
        "Like `/predict`, for the model in the path.",
        status=202,
        extra=predict_schemas.PREDICT_BODY,
        shown=_method == "POST",
    )
document(
    predict,
    "POST",
    "/batch_predict",
    "Submit a list of inputs as one job",
    predict_schemas.SUBMIT_RESPONSES,
    "Queue a list of inputs as one task, at most `queue.max_items`. Its result is a list with one entry per "
    "input.",
    status=202,
    extra=predict_schemas.BATCH_BODY,
)
document(
    predict,
    "PUT",
    "/tasks/{task_id}",
    "Submit one input under your own id",
    predict_schemas.PUT_RESPONSES,
    """Like `/predict`, and safe to repeat: the same request returns the existing task, a different one is a
    409.

An id has 1 to 200 letters, digits, `_`, `.`, `:` and `-`.""",
    status=202,
    extra=predict_schemas.PREDICT_BODY,
)

result = APIRouter(tags=["result"])
document(
    result,
    "GET",
    "/result/{task_id:path}",
    "The state of a task, and its result",
    predict_schemas.RESULT_RESPONSES,
    """Answer at once, or with `wait` as soon as the task has ended. A failed task is a 200, too.

404: the id is unknown; with `wait`, it is still unknown at the end of the wait. 410: the task is known, but
its result has expired.""",
    extra={
        "parameters": [
            {
                "name": "wait",
                "in": "query",
                "required": False,
                "schema": {"type": "string"},
                "description": "Seconds to wait for the task to end, at most api.max_wait_s.",
            }
        ]
    },
)
