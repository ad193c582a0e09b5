# SPDX-License-Identifier: Apache-2.0
"""Every error a user can meet, in one tree.

Where each family is raised, along the way of a request::

    settings ─ ConfigError
    client ── api ── Unauthorized, Forbidden, InputError, UnknownModel, FrontBusy ── RateLimited
                       queue ── BrokerError, QueueFull, TaskNotFound, TaskExpired, TaskRevoked, DeadLettered
                                  worker ── DeviceError, ModelError, TimeLimitExceeded

Each class names a stable ``code`` (what programs match on), the HTTP status the API answers with, and the
exit code the command line ends with (sysexits.h); what it does not name, it has from its base. ``args`` is
always ``(message, field)``, so that an error survives Celery's JSON result format unchanged.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar


def _encodable(text: str) -> str:
    """Escape lone surrogates, which JSON from outside may contain and our own JSON cannot."""
    return str(text).encode("utf-8", "backslashreplace").decode()


class GpuinferError(Exception):
    """Base of all errors raised by gpuinfer.

    ``message`` says what was wrong and what would be right; ``field`` names the offending input.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    exit_code: int = os.EX_SOFTWARE
    #: True when the same request may succeed later, unchanged.
    transient: ClassVar[bool] = False

    def __init_subclass__(
        cls, *, code: str, status: int | None = None, exit_code: int | None = None, transient: bool = False
    ) -> None:
        """Set what the class statement names. A subclass of a transient error is transient, too."""
        super().__init_subclass__()
        cls.code = code
        cls.http_status = cls.http_status if status is None else status
        cls.exit_code = cls.exit_code if exit_code is None else exit_code
        cls.transient = cls.transient or transient

    def __init__(self, message: str = "", field: str | None = None) -> None:
        self.message = _encodable(message)
        self.field = None if field is None else _encodable(field)
        super().__init__(self.message, self.field)

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"code", "message"}``, and ``"field"`` where one is known."""
        body: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.field:
            body["field"] = self.field
        return body


# -- settings, commands, processes ----------------------------------------------------------


class ConfigError(GpuinferError, code="bad_config", exit_code=os.EX_CONFIG):
    """Raised when a setting is unknown or has a bad value."""


class UnusableRedis(ConfigError, code="unusable_redis", status=503):
    """Raised when this Redis cannot be used as it is: another one is needed."""


class FormatMismatch(UnusableRedis, code="format_mismatch"):
    """Raised when the data in Redis is in the format of another edition of gpuinfer."""


class ClusterUnsupported(UnusableRedis, code="cluster_unsupported"):
    """Raised when the configured Redis is part of a Redis Cluster."""


class UsageError(GpuinferError, code="bad_usage", status=400, exit_code=os.EX_USAGE):
    """Raised when a command is called with arguments that cannot work."""


class AddressUnavailable(GpuinferError, code="address_unavailable", exit_code=os.EX_UNAVAILABLE):
    """Raised when a server cannot listen on the configured address."""


class ProcessesFailed(GpuinferError, code="processes_failed"):
    """Raised when a process of the front ends before it has served anything."""


class JournalUnavailable(GpuinferError, code="journal_unavailable", exit_code=os.EX_UNAVAILABLE):
    """Raised when the journal is needed and this host has none."""


class UnitsUnavailable(GpuinferError, code="units_unavailable", exit_code=os.EX_UNAVAILABLE):
    """Raised when systemd cannot be reached over D-Bus, or a worker process cannot be started."""


class UnitRefused(GpuinferError, code="unit_refused", exit_code=os.EX_NOPERM):
    """Raised when systemd, or polkit, refuses to start, stop or reset a worker's unit."""


class UnitStopping(GpuinferError, code="unit_stopping", exit_code=os.EX_TEMPFAIL):
    """Raised when the start of a worker is dropped because it would undo a stop."""


class NotPermitted(GpuinferError, code="not_permitted", exit_code=os.EX_NOPERM):
    """Raised when the caller of a command lacks the permission that it needs."""


class OutputFailed(GpuinferError, code="output_failed", exit_code=os.EX_IOERR):
    """Raised when the output of a command cannot be written: its disk is full."""


class BadKey(ConfigError, code="bad_key"):
    """Raised when a key's file is wrong, or a value given for a new key."""


class UnknownKey(GpuinferError, code="unknown_key", exit_code=os.EX_NOINPUT):
    """Raised when this host has no key of that name."""


class KeyExists(GpuinferError, code="key_exists", exit_code=os.EX_CANTCREAT):
    """Raised when the name of a new key is taken."""


class RootKept(GpuinferError, code="root_kept", exit_code=os.EX_NOPERM):
    """Raised when a process of root cannot become the worker's user, and so must not run a model."""


class DiskFull(GpuinferError, code="disk_full", status=503, exit_code=os.EX_TEMPFAIL, transient=True):
    """Raised when Redis is not started because its disk lacks space for what it must write."""


class MissingExtra(GpuinferError, code="missing_extra", exit_code=os.EX_UNAVAILABLE):
    """Raised when a command needs a library that is not installed; the message names the extra."""


class WorkerRunning(GpuinferError, code="worker_running", exit_code=os.EX_CANTCREAT):
    """Raised when an operation needs a stopped worker and this one runs."""


class TakenBack(GpuinferError, code="taken_back", exit_code=os.EX_TEMPFAIL):
    """Raised when a reaper took this worker for dead and put its tasks back."""


# -- access ---------------------------------------------------------------------------------


class Unauthorized(GpuinferError, code="unauthorized", status=401, exit_code=os.EX_NOPERM):
    """Raised when a request needs a key and has no valid one."""

    #: True: a token was given, and it belongs to no key.
    refused_token = False


class Forbidden(GpuinferError, code="forbidden", status=403, exit_code=os.EX_NOPERM):
    """Raised when a key does not allow the request. ``field`` names what it does not allow."""


class ForeignHost(Forbidden, code="foreign_host"):
    """Raised when a request without a key has a Host that is not this host's (DNS rebinding)."""


class ForeignOrigin(Forbidden, code="foreign_origin"):
    """Raised when a web page's origin is neither this host nor one of ``api.cors_origins``."""


# -- input ----------------------------------------------------------------------------------


class InputError(GpuinferError, code="bad_input", status=422, exit_code=os.EX_DATAERR):
    """Raised when a request's input is malformed. Never retried."""


class ShapeMismatch(InputError, code="shape_mismatch"):
    """Raised when an input tensor's shape is not the one in the manifest."""


class DtypeMismatch(InputError, code="dtype_mismatch"):
    """Raised when an input's values or dtype do not fit the manifest's dtype."""


class NonFiniteInput(InputError, code="non_finite_input"):
    """Raised when an input contains NaN or infinity and the manifest does not allow it."""


class MissingInput(InputError, code="missing_input"):
    """Raised when one of a model's several inputs is missing."""


class IdempotencyConflict(InputError, code="idempotency_conflict"):
    """Raised when an idempotency key was used for another request already."""


class TaskExists(InputError, code="task_exists", status=409):
    """Raised when a client's own task id was used for another request already."""


class UnknownParameter(InputError, code="unknown_parameter", status=400):
    """Raised when a URL has a query parameter that its route does not know."""


class MalformedJson(InputError, code="malformed_json", status=400):
    """Raised when a request's body is not JSON."""


class MalformedForm(InputError, code="malformed_form", status=400):
    """Raised when a request's body is not the form that its Content-Type announces."""


class MalformedEncoding(InputError, code="malformed_encoding", status=400):
    """Raised when a request's body cannot be unpacked as its Content-Encoding says."""


class UnsupportedEncoding(InputError, code="unsupported_encoding", status=415):
    """Raised when a request's Content-Encoding is not supported."""


class NotAcceptable(InputError, code="not_acceptable", status=406):
    """Raised when a result is available in none of the content types that a request accepts."""


class PayloadTooLarge(InputError, code="payload_too_large", status=413):
    """Raised when a request is larger than ``queue.max_payload_bytes``."""


class SlowBody(InputError, code="slow_body", status=408):
    """Raised when the body of a request stops arriving."""


class TaskNotServed(InputError, code="task_not_served"):
    """Raised for a task that a GPU worker does not run: one of Celery's own, such as ``celery.map``."""


# -- models and devices ---------------------------------------------------------------------


class ModelError(GpuinferError, code="model_error", exit_code=os.EX_DATAERR):
    """Raised when a model cannot be used."""


class UnknownModel(ModelError, code="unknown_model", status=404):
    """Raised when no model of that name is installed, or this worker does not serve it."""


class ManifestError(ModelError, code="bad_manifest"):
    """Raised when a ``model.toml`` is missing, unreadable or wrong."""


class ModelNotAdded(ModelError, code="model_not_added"):
    """Raised when a folder was put into models.folders by hand, so that no digest is recorded."""


class DigestMismatch(ModelError, code="digest_mismatch"):
    """Raised when a model's files are not the recorded or expected ones; none is opened."""


class ModelLoadError(ModelError, code="model_load_failed"):
    """Raised when torch cannot load an artefact, or its warm-up fails."""


class InferenceError(ModelError, code="inference_failed"):
    """Raised when the model itself fails on an input that fits its manifest."""


class DeviceError(GpuinferError, code="device_unusable", exit_code=os.EX_UNAVAILABLE):
    """Raised when a worker's GPU cannot be used. Carries the driver's message."""


class DeviceOutOfMemory(
    GpuinferError, code="device_out_of_memory", status=503, exit_code=os.EX_TEMPFAIL, transient=True
):
    """Raised when not even a batch of one fits into the device's memory. Retried, with back-off."""


# -- Redis, and what it or the front refuses ------------------------------------------------


class BrokerError(GpuinferError, code="broker_error", exit_code=os.EX_PROTOCOL):
    """Raised when Redis answers with an error that no retry will change: a key of another type, say."""

    #: Where many tasks were submitted at once: the ids of those that were accepted nevertheless.
    accepted: tuple[str, ...] = ()


class BrokerRefused(BrokerError, code="broker_refused", exit_code=os.EX_NOPERM):
    """Raised when the Redis user lacks a permission that is needed."""


class BrokerUnavailable(
    BrokerError, code="broker_unavailable", status=503, exit_code=os.EX_UNAVAILABLE, transient=True
):
    """Raised when Redis cannot be reached or does not answer."""


class QueueFull(BrokerUnavailable, code="queue_full", status=429):
    """Raised when new work is refused: a limit of waiting tasks is reached, or Redis's memory is full."""


class KeyQuota(QueueFull, code="key_quota"):
    """Raised when a key has reached its limit of waiting tasks, or of their bytes."""


class RateLimited(GpuinferError, code="rate_limited", status=429, exit_code=os.EX_TEMPFAIL, transient=True):
    """Raised when a key submits faster than its rate allows."""

    def __init__(
        self, message: str = "", field: str | None = None, *, retry_after_s: float = 0.0, reset_s: float = 0.0
    ) -> None:
        super().__init__(message, field)
        #: Seconds until one more task would be accepted, and until the whole burst would be.
        self.retry_after_s, self.reset_s = retry_after_s, reset_s


class NotReady(GpuinferError, code="not_ready", status=503, exit_code=os.EX_UNAVAILABLE, transient=True):
    """Raised when no live worker serves the model, and no live watcher may start one."""


class FrontBusy(GpuinferError, code="front_busy", status=503, exit_code=os.EX_TEMPFAIL, transient=True):
    """Raised when a front has reached its limit of requests, or of their bytes."""


# -- tasks and workers ----------------------------------------------------------------------


class TaskNotFound(GpuinferError, code="task_not_found", status=404, exit_code=os.EX_NOINPUT):
    """Raised when a task id was never submitted, or its result has expired."""


class ResultGone(TaskNotFound, code="result_gone", status=410):
    """Raised when a task was known, and its result has expired or was deleted."""


class UnknownWorker(GpuinferError, code="unknown_worker", status=404, exit_code=os.EX_NOINPUT):
    """Raised when no worker of that name is known."""


class WrongState(GpuinferError, code="wrong_state", status=409, exit_code=os.EX_DATAERR):
    """Raised when a task's state does not allow the operation: it has, or has not, ended."""


class UnreadableResult(GpuinferError, code="unreadable_result", status=409, exit_code=os.EX_DATAERR):
    """Raised when a task's key in Redis contains another program's data, not a task's state."""


class TaskFailed(GpuinferError, code="task_failed", exit_code=1):
    """Raised when a task ended in an error that this version has no class for."""


class ResultTooLarge(GpuinferError, code="result_too_large", status=422, exit_code=os.EX_DATAERR):
    """Raised when a task's result is larger than ``queue.max_result_bytes``, or than Redis accepts."""


class TaskExpired(GpuinferError, code="expired", status=410, exit_code=os.EX_TEMPFAIL):
    """Raised when a task's deadline passed before a worker began it."""


class TaskRevoked(GpuinferError, code="revoked", status=410, exit_code=1):
    """Raised when a task was cancelled before it had ended."""


class ChainRefused(GpuinferError, code="chain_refused", exit_code=1):
    """Raised for the next task of a chain when it cannot be submitted; the one before it has succeeded."""


class DeadLettered(GpuinferError, code="dead_lettered", exit_code=1):
    """Raised when a task was set aside: its worker died under it too often, or it cannot be decoded."""


class WaitTimeout(GpuinferError, code="wait_timeout", status=504, exit_code=os.EX_TEMPFAIL, transient=True):
    """Raised when a result has not come within the time that the caller waits."""


class TimeLimitExceeded(GpuinferError, code="time_limit_exceeded", status=504, exit_code=1):
    """Raised when a task ran past its hard time limit and its worker had to be killed."""


class SoftTimeLimitExceeded(GpuinferError, code="soft_time_limit_exceeded", status=504, exit_code=1):
    """Raised when a task ran past its soft time limit and could be interrupted."""


def _tree(base: type[GpuinferError]) -> dict[str, type[GpuinferError]]:
    found = {base.code: base}
    for cls in base.__subclasses__():
        found |= _tree(cls)
    return found


#: code -> class, for rebuilding an error from its ``to_dict()`` form.
BY_CODE = _tree(GpuinferError)


def from_dict(body: dict[str, Any]) -> GpuinferError:
    """Rebuild an error from ``to_dict()``; a code of another version becomes ``TaskFailed``."""
    code, message, field = str(body.get("code")), str(body.get("message", "")), body.get("field")
    cls = BY_CODE.get(code)
    return cls(message, field) if cls else TaskFailed(f"{code}: {message}", field)
