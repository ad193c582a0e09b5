# SPDX-License-Identifier: Apache-2.0
"""What ``/docs`` tells of the routes that must be fast; ``front`` serves them."""

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
    """Put one input into a queue. The body is the input, or an object with it and options beside it.

A file is sent as it is, with options in the URL, or in a form, with options beside it. With `Prefer: wait=5`
or `?wait=5` the answer is 200 and the task when it has ended in time, failed or not.""",
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
        "As `/predict`, for the model that the path names.",
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
    "Put a list of inputs into a queue as one task, `queue.max_items` at most; its result is a list, with an "
    "entry for each input.",
    status=202,
    extra=predict_schemas.BATCH_BODY,
)
document(
    predict,
    "PUT",
    "/tasks/{task_id}",
    "Submit one input under an id of your own",
    predict_schemas.PUT_RESPONSES,
    """As `/predict`, and safe to repeat: the same request finds the task that is there, another one is a 409.

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

An id that nothing is known of is a 404; with `wait`, when it has not ended by then. 410: it is known, and its
result has expired.""",
    extra={
        "parameters": [
            {
                "name": "wait",
                "in": "query",
                "required": False,
                "schema": {"type": "string"},
                "description": "Seconds to wait for the task to end, cut to api.max_wait_s.",
            }
        ]
    },
)
