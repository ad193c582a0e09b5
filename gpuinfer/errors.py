# SPDX-License-Identifier: Apache-2.0
"""Every error a user can meet, in one tree.

Where each family is raised, along the way of a request::

    settings ─ ConfigError
    client ── api ── InputError, PayloadTooLarge, UnknownModel ── BrokerError, QueueFull, RateLimited
                       queue ── TaskNotFound, TaskExpired, TaskRevoked, DeadLettered
                                  worker ── DeviceError, ModelError, TimeLimitExceeded, TransientError

Each class carries a stable ``code`` (what programs match on), the HTTP status the API answers
with, and the exit code the command line ends with (sysexits.h). ``args`` is always
``(message, field)``, so that an error survives Celery's JSON result format unchanged.
"""

from __future__ import annotations

from typing import Any, ClassVar


def _encodable(text: str) -> str:
    """Escape half surrogates, which JSON from outside may hold and no JSON of ours can."""
    return str(text).encode("utf-8", "backslashreplace").decode()


class GpuinferError(Exception):
    """Base of all errors raised by gpuinfer.

    ``message`` says what was wrong and what would be right; ``field`` names the offending input.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 70  # EX_SOFTWARE
    #: True when the same request may succeed later, unchanged.
    transient: ClassVar[bool] = False

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


class ConfigError(GpuinferError):
    """Raised when a setting is unknown or has a bad value."""

    code = "bad_config"
    exit_code = 78  # EX_CONFIG


class UnusableRedis(ConfigError):
    """Raised when a Redis cannot be worked with as it is: it is another one that is wanted."""

    code = "unusable_redis"
    http_status = 503


class FormatMismatch(UnusableRedis):
    """Raised when what lies in Redis is laid out as another edition of gpuinfer does it."""

    code = "format_mismatch"


class ClusterUnsupported(UnusableRedis):
    """Raised when the Redis that is named is part of a Redis Cluster."""

    code = "cluster_unsupported"


class UsageError(GpuinferError):
    """Raised when a command is called with arguments that cannot work."""

    code = "bad_usage"
    http_status = 400
    exit_code = 64  # EX_USAGE


class AddressUnavailable(GpuinferError):
    """Raised when a server cannot listen where it was told to."""

    code = "address_unavailable"
    exit_code = 69  # EX_UNAVAILABLE


class ProcessesFailed(GpuinferError):
    """Raised when a process of the front ends before it has served at all."""

    code = "processes_failed"


class JournalUnavailable(GpuinferError):
    """Raised when the journal is asked for where there is none."""

    code = "journal_unavailable"
    exit_code = 69  # EX_UNAVAILABLE


class UnitsUnavailable(GpuinferError):
    """Raised when systemd cannot be reached over D-Bus, or a worker process cannot be started."""

    code = "units_unavailable"
    exit_code = 69  # EX_UNAVAILABLE


class UnitRefused(GpuinferError):
    """Raised when systemd, or polkit for it, refuses to start, stop or reset a worker's unit."""

    code = "unit_refused"
    exit_code = 77  # EX_NOPERM


class UnitStopping(GpuinferError):
    """Raised when the start of a worker is dropped because it would undo a stop."""

    code = "unit_stopping"
    exit_code = 75  # EX_TEMPFAIL


class NotPermitted(GpuinferError):
    """Raised when who calls a command may not do what it does."""

    code = "not_permitted"
    exit_code = 77  # EX_NOPERM


class BadKey(ConfigError):
    """Raised when a key's file, or what a key is to be made of, is wrong."""

    code = "bad_key"


class UnknownKey(GpuinferError):
    """Raised when a key is named that this host does not have."""

    code = "unknown_key"
    exit_code = 66  # EX_NOINPUT


class KeyExists(GpuinferError):
    """Raised when a key is to be made whose name is taken."""

    code = "key_exists"
    exit_code = 73  # EX_CANTCREAT


class RootKept(GpuinferError):
    """Raised when root's process cannot become the worker's user, and so may not run a model."""

    code = "root_kept"
    exit_code = 77  # EX_NOPERM


class DiskFull(GpuinferError):
    """Raised when Redis is not started because its disk has no room for what it must write."""

    code = "disk_full"
    http_status = 503
    exit_code = 75  # EX_TEMPFAIL
    transient = True


class MissingExtra(GpuinferError):
    """Raised when a command needs a library that is not installed, and says which extra brings it."""

    code = "missing_extra"
    exit_code = 69  # EX_UNAVAILABLE


# -- who may ask ----------------------------------------------------------------------------


class Unauthorized(GpuinferError):
    """Raised when a request needs a key and has none that counts."""

    code = "unauthorized"
    http_status = 401
    exit_code = 77  # EX_NOPERM
    #: True: a token was given, and it is of no key.
    refused_token = False


class Forbidden(GpuinferError):
    """Raised when a key does not allow what is asked for. ``field`` names what it does not allow."""

    code = "forbidden"
    http_status = 403
    exit_code = 77  # EX_NOPERM


class ForeignHost(Forbidden):
    """Raised when who needs no key asks under a name that is not this host's.

    A web page could have made its own name mean this host (DNS rebinding).
    """

    code = "foreign_host"


class ForeignOrigin(Forbidden):
    """Raised when a web page asks whose origin is neither this host nor one of ``api.cors_origins``."""

    code = "foreign_origin"


# -- what a caller sent ---------------------------------------------------------------------


class InputError(GpuinferError):
    """Raised when a request's input is malformed. Never retried."""

    code = "bad_input"
    http_status = 422
    exit_code = 65  # EX_DATAERR


class ShapeMismatch(InputError):
    """Raised when an input tensor's shape is not the one the manifest names."""

    code = "shape_mismatch"


class DtypeMismatch(InputError):
    """Raised when an input's values or dtype do not fit the manifest's dtype."""

    code = "dtype_mismatch"


class NonFiniteInput(InputError):
    """Raised when an input holds NaN or infinity and the manifest does not allow it."""

    code = "non_finite_input"


class MissingInput(InputError):
    """Raised when a model with several inputs is not given one of them."""

    code = "missing_input"


class IdempotencyConflict(InputError):
    """Raised when an idempotency key stands for another request already."""

    code = "idempotency_conflict"


class TaskExists(InputError):
    """Raised when an id of a client's own stands for another request already."""

    code = "task_exists"
    http_status = 409


class UnknownParameter(InputError):
    """Raised when a URL has a query parameter that its route does not know."""

    code = "unknown_parameter"
    http_status = 400


class MalformedJson(InputError):
    """Raised when a request's body is not JSON."""

    code = "malformed_json"
    http_status = 400

    def __init__(self, message: str = "", field: str | None = "body") -> None:
        super().__init__(message, field)


class MalformedForm(InputError):
    """Raised when a request's body is not the form that its Content-Type says."""

    code = "malformed_form"
    http_status = 400

    def __init__(self, message: str = "", field: str | None = "body") -> None:
        super().__init__(message, field)


class MalformedEncoding(InputError):
    """Raised when a request's body cannot be unpacked by the coding that its Content-Encoding names."""

    code = "malformed_encoding"
    http_status = 400


class UnsupportedEncoding(InputError):
    """Raised when a request's Content-Encoding is one that is not read."""

    code = "unsupported_encoding"
    http_status = 415


class NotAcceptable(InputError):
    """Raised when a result has none of the content types that a request accepts."""

    code = "not_acceptable"
    http_status = 406


class PayloadTooLarge(InputError):
    """Raised when a request is larger than ``queue.max_payload_bytes``."""

    code = "payload_too_large"
    http_status = 413


class SlowBody(InputError):
    """Raised when the body of a request does not go on arriving."""

    code = "slow_body"
    http_status = 408


# -- models ---------------------------------------------------------------------------------


class ModelError(GpuinferError):
    """Raised when a model cannot be used."""

    code = "model_error"
    exit_code = 65


class UnknownModel(ModelError):
    """Raised when no model of that name is installed, or this worker does not serve it."""

    code = "unknown_model"
    http_status = 404


class ManifestError(ModelError):
    """Raised when a ``model.toml`` is missing, unreadable or wrong."""

    code = "bad_manifest"


class ModelNotAdded(ModelError):
    """Raised when a folder of models.folders was put there by hand: nobody has recorded its digest."""

    code = "model_not_added"


class DigestMismatch(ModelError):
    """Raised when a model's files are not those that were added, or expected; none is opened."""

    code = "digest_mismatch"


class ModelLoadError(ModelError):
    """Raised when torch cannot load an artefact, or its warm-up fails."""

    code = "model_load_failed"


class InferenceError(ModelError):
    """Raised when the model itself fails on an input that fits its manifest."""

    code = "inference_failed"


# -- devices --------------------------------------------------------------------------------


class DeviceError(GpuinferError):
    """Raised when the GPU a worker was given cannot be used. Carries the driver's words."""

    code = "device_unusable"
    exit_code = 69  # EX_UNAVAILABLE


class TransientError(GpuinferError):
    """Raised for a failure that may pass by itself; retried with back-off, a bounded number of times."""

    code = "transient_failure"
    http_status = 503
    exit_code = 75  # EX_TEMPFAIL
    transient = True


class DeviceOutOfMemory(TransientError):
    """Raised when even a batch of one does not fit into the device's memory."""

    code = "device_out_of_memory"


class TaskNotServed(InputError):
    """Raised for a task that a GPU worker does not run: one of Celery's own, such as ``celery.map``."""

    code = "task_not_served"


# -- queue ----------------------------------------------------------------------------------


class BrokerError(GpuinferError):
    """Raised when Redis answers with an error that no attempt will change: a key of another type, say."""

    code = "broker_error"
    exit_code = 76  # EX_PROTOCOL
    #: Of many that were submitted at once, the ids of those that were accepted all the same.
    accepted: tuple[str, ...] = ()


class BrokerRefused(BrokerError):
    """Raised when the Redis user lacks a right that is needed."""

    code = "broker_refused"
    exit_code = 77  # EX_NOPERM


class BrokerUnavailable(BrokerError):
    """Raised when Redis cannot be reached or does not answer."""

    code = "broker_unavailable"
    http_status = 503
    exit_code = 69
    transient = True


class QueueFull(BrokerUnavailable):
    """Raised when new work is refused: a bound of what may wait is reached, or Redis's memory is full."""

    code = "queue_full"
    http_status = 429


class KeyQuota(QueueFull):
    """Raised when a key has as many tasks, or bytes of them, waiting as it may."""

    code = "key_quota"


class RateLimited(GpuinferError):
    """Raised when a key submits faster than it may."""

    code = "rate_limited"
    http_status = 429
    exit_code = 75  # EX_TEMPFAIL
    transient = True

    def __init__(
        self, message: str = "", field: str | None = None, *, retry_after_s: float = 0.0, reset_s: float = 0.0
    ) -> None:
        super().__init__(message, field)
        #: Seconds until one more task would be accepted, and until the whole burst would be.
        self.retry_after_s, self.reset_s = retry_after_s, reset_s


class NotReady(GpuinferError):
    """Raised when no live worker serves what is asked for, and no live watcher may start one."""

    code = "not_ready"
    http_status = 503
    exit_code = 69
    transient = True


class FrontBusy(GpuinferError):
    """Raised when a front has as many requests, or holds as many bytes of them, as it may."""

    code = "front_busy"
    http_status = 503
    exit_code = 75  # EX_TEMPFAIL
    transient = True


class TaskNotFound(GpuinferError):
    """Raised when a task id was never submitted, or its result has expired."""

    code = "task_not_found"
    http_status = 404
    exit_code = 66  # EX_NOINPUT


class ResultGone(TaskNotFound):
    """Raised when a task was known once, and its result has expired or was deleted."""

    code = "result_gone"
    http_status = 410


class UnknownWorker(GpuinferError):
    """Raised when nothing is known of a worker."""

    code = "unknown_worker"
    http_status = 404
    exit_code = 66  # EX_NOINPUT


class WrongState(GpuinferError):
    """Raised when a task's state does not allow what is asked for: it has, or has not, ended."""

    code = "wrong_state"
    http_status = 409
    exit_code = 65  # EX_DATAERR


class UnreadableResult(GpuinferError):
    """Raised when what stands under a task's key in Redis is no state of a task: it is another program's."""

    code = "unreadable_result"
    http_status = 409
    exit_code = 65  # EX_DATAERR


class TaskFailed(GpuinferError):
    """Raised when a task ended in an error that this version has no class for."""

    code = "task_failed"
    exit_code = 1


class ResultTooLarge(GpuinferError):
    """Raised when a task's result has more bytes than ``queue.max_result_bytes``, or than Redis takes."""

    code = "result_too_large"
    http_status = 422
    exit_code = 65  # EX_DATAERR


class TaskExpired(GpuinferError):
    """Raised when a task's deadline passed before a worker began it."""

    code = "expired"
    http_status = 410
    exit_code = 75


class TaskRevoked(GpuinferError):
    """Raised when a task was cancelled before it had ended."""

    code = "revoked"
    http_status = 410
    exit_code = 1


class ChainRefused(GpuinferError):
    """Raised for the next task of a chain when it cannot be sent on; the one before it has succeeded."""

    code = "chain_refused"
    exit_code = 1


class DeadLettered(GpuinferError):
    """Raised when a task was set aside: its worker died under it too often, or it could not be decoded."""

    code = "dead_lettered"
    exit_code = 1


class WaitTimeout(GpuinferError):
    """Raised when a result has not come within the time the caller was ready to wait."""

    code = "wait_timeout"
    http_status = 504
    exit_code = 75
    transient = True


class TimeLimitExceeded(GpuinferError):
    """Raised when a task ran past its hard time limit and its worker had to be ended."""

    code = "time_limit_exceeded"
    http_status = 504
    exit_code = 1


class SoftTimeLimitExceeded(GpuinferError):
    """Raised when a task ran past its soft time limit and could be interrupted."""

    code = "soft_time_limit_exceeded"
    http_status = 504
    exit_code = 1


class WorkerRunning(GpuinferError):
    """Raised when an operation needs a stopped worker and this one runs."""

    code = "worker_running"
    exit_code = 73  # EX_CANTCREAT


class TakenBack(GpuinferError):
    """Raised when a reaper took this worker for dead and put back what it held."""

    code = "taken_back"
    exit_code = 75  # EX_TEMPFAIL


def _by_code() -> dict[str, type[GpuinferError]]:
    found: dict[str, type[GpuinferError]] = {}
    stack: list[type[GpuinferError]] = [GpuinferError]
    while stack:
        cls = stack.pop()
        found[cls.code] = cls
        stack.extend(cls.__subclasses__())
    return found


#: code -> class, for rebuilding an error from its ``to_dict()`` form.
BY_CODE: dict[str, type[GpuinferError]] = _by_code()


def from_dict(body: dict[str, Any]) -> GpuinferError:
    """Rebuild an error from ``to_dict()``; a code of another version becomes ``TaskFailed``."""
    cls = BY_CODE.get(str(body.get("code", "")))
    message = str(body.get("message", ""))
    field = body.get("field")
    if cls is None:
        return TaskFailed(f"{body.get('code')}: {message}", field)
    return cls(message, field)
