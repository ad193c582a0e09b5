# SPDX-License-Identifier: Apache-2.0
"""The settings' sections: each key with its type, bounds and default. ``settings.py`` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
)

from gpuinfer import addresses, redis_url
from gpuinfer.names import QUEUES, QueueName

if TYPE_CHECKING:
    from pydantic._internal._repr import ReprArgs

#: What a task's error says about an exception in a model.
Errors = Literal["full", "none"]
#: A worker counts as dead after this many seconds at the earliest: it sends a heartbeat every five or six.
LEAST_REAP_S = 10


def _split(value: object) -> object:
    """Accept a list as ``a,b,c`` (a variable has no lists), and the index of a GPU as a number."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, int) and not isinstance(value, bool):
        return (str(value),)
    if isinstance(value, list | tuple):
        return tuple(_number_as_text(item) for item in value)
    return value


def _number_as_text(item: object) -> object:
    return str(item) if isinstance(item, int) and not isinstance(item, bool) else item


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_split)]
Networks = Annotated[tuple[Annotated[str, AfterValidator(addresses.network)], ...], BeforeValidator(_split)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(addresses.origin)], ...], BeforeValidator(_split)]
Hosts = Annotated[tuple[Annotated[str, AfterValidator(addresses.host_name)], ...], BeforeValidator(_split)]
#: Prefixes of keys in Redis that are no queues.
_KEPT = ("gpuinfer:", "celery-task-meta-", "_kombu", "unacked")


def _foreign(name: str) -> str:
    if name.partition("@")[0].partition(".")[0] in QUEUES or name.startswith(_KEPT):
        raise ValueError("must be a queue of another application's workers")
    return name


#: It becomes a part of the workers' rights in Redis, so it must have no wildcard characters.
ForeignQueue = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:@/-]*$", max_length=200), AfterValidator(_foreign)
]
PriorityStep = Annotated[int, Field(ge=0, le=9)]


class Section(BaseModel):
    # A ValidationError must not show a password. Our own messages name the value.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: object) -> object:
        """Refuse true and false, which pydantic would read as the numbers 1 and 0."""
        if isinstance(value, bool):
            raise ValueError("must not be true or false")  # noqa: TRY004  pydantic reports ValueError
        return value


class BrokerSettings(Section):
    """The address and login of Redis."""

    #: redis://host:port/db, rediss://host:port/db (TLS), or unix:///path/to.sock?db=0. Its options may be
    #: health_check_interval, socket_timeout, protocol and client_name.
    url: str = "unix:///run/gpuinfer/redis/redis.sock?db=0"
    username: str | None = None
    password: SecretStr | None = None
    #: CA bundle that signed the server's certificate, for rediss://
    tls_ca: Path | None = None
    connect_timeout_s: float = Field(default=5.0, gt=0, le=300)

    @field_validator("username", "password", "tls_ca", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("url")
    @classmethod
    def _usable(cls, value: str) -> str:
        redis_url.parse(value)
        return value

    def __repr_args__(self) -> ReprArgs:
        """Hide a password inside the URL."""
        for name, value in super().__repr_args__():
            yield name, redis_url.masked(str(value)) if name == "url" else value


class RedisSettings(Section):
    """This host's own Redis, configured at each of its starts. /etc/gpuinfer/redis.conf wins."""

    #: maxmemory in MiB; 0: a share of the host's memory, within a floor and a ceiling.
    maxmemory_mb: int = Field(default=0, ge=0, le=16 * 1024 * 1024)
    maxmemory_share: float = Field(default=0.25, gt=0, le=0.5)
    maxmemory_floor_mb: int = Field(default=256, ge=16, le=1024 * 1024)
    maxmemory_ceiling_mb: int = Field(default=16384, ge=16, le=1024 * 1024)
    #: always: a kill of Redis or a power cut loses nothing; everysec: up to two seconds of accepted work;
    #: auto: always where ``gpuinfer redis prepare`` measures at most 0.1 ms for an fsync, else everysec.
    appendfsync: Literal["auto", "everysec", "always"] = "auto"


class QueueSettings(Section):
    """Limits and times of what is kept in Redis, and the names shared with other Celery applications."""

    #: Results expire this long after the task ended.
    result_ttl_s: int = Field(default=3600, ge=1, le=30 * 86400)
    #: The same idempotency key gives the same task for this long.
    idempotency_ttl_s: int = Field(default=86400, ge=1, le=365 * 86400)
    #: The most waiting tasks, and their bytes (0: half of Redis's maxmemory), of which batch may use half.
    max_waiting: int = Field(default=1_000_000, ge=1, le=1_000_000_000)
    max_waiting_bytes: int = Field(default=0, ge=0, le=2**50)
    #: The most new idempotency keys within idempotency_ttl_s; a sixteenth of maxmemory is a second limit.
    max_keys: int = Field(default=1_000_000, ge=1, le=1_000_000_000)
    #: A request larger than this is refused, before it reaches Redis.
    max_payload_bytes: int = Field(default=32 * 1024 * 1024, ge=1024, le=512 * 1024 * 1024)
    #: A list job of more inputs than this is refused.
    max_items: int = Field(default=10_000, ge=1, le=10_000_000)
    #: A task whose result is larger than this fails.
    max_result_bytes: int = Field(default=32 * 1024 * 1024, ge=1024, le=512 * 1024 * 1024)
    #: Retries of a transient failure, and the first pause; each later pause is twice as long.
    max_retries: int = Field(default=3, ge=0, le=20)
    retry_backoff_s: float = Field(default=0.5, gt=0, le=600)
    #: A task that killed this many workers goes to the dead letters.
    max_deaths: int = Field(default=2, ge=2, le=10)
    #: The most tasks that may wait for their ETA; one more is refused, or fails.
    max_later: int = Field(default=100_000, ge=1, le=100_000_000)
    #: Bounds of the dead letters; beyond them the oldest are deleted.
    max_dead: int = Field(default=10_000, ge=1, le=1_000_000)
    max_dead_bytes: int = Field(default=256 * 1024 * 1024, ge=1024, le=64 * 1024**3)
    dead_ttl_s: int = Field(default=30 * 86400, ge=60, le=10 * 365 * 86400)
    #: Bounds of the messages of failed tasks, which are kept so that the tasks can be sent again; beyond them
    #: the oldest are deleted. 0: none is kept.
    max_failed: int = Field(default=10_000, ge=0, le=1_000_000)
    max_failed_bytes: int = Field(default=32 * 1024 * 1024, ge=1024, le=64 * 1024**3)
    failed_ttl_s: int = Field(default=86400, ge=1, le=10 * 365 * 86400)
    #: A list that was not served for this long may be served first, in at most a fifth of the claims; 0:
    #: never.
    ageing_s: float = Field(default=10.0, ge=0, le=86400)
    #: How often an idle worker polls for tasks of plain Celery producers, which wake no worker.
    poll_ms: int = Field(default=50, ge=5, le=1000)
    #: The queue of the next task of a chain where it names none and is no prediction; and further queues of
    #: other applications that chains may use.
    chain_queue: ForeignQueue = "celery"
    chain_queues: Annotated[tuple[ForeignQueue, ...], BeforeValidator(_split)] = ()
    #: The priority steps of the workers that consume those queues (kombu's ``priority_steps``).
    chain_priority_steps: Annotated[
        tuple[PriorityStep, ...], BeforeValidator(_split), Field(min_length=1)
    ] = (0, 3, 6, 9)
    #: Other task names that are run as gpuinfer.predict and gpuinfer.batch_predict.
    predict_aliases: Names = ("celery_app.predict", "tasks.predict")
    batch_predict_aliases: Names = ("celery_app.batch_predict", "tasks.batch_predict")

    @property
    def foreign_queues(self) -> tuple[str, ...]:
        """All queues of other applications that chains may use."""
        return tuple(dict.fromkeys((self.chain_queue, *self.chain_queues)))


class ModelsSettings(Section):
    """The models of this host."""

    #: Folders with one sub-folder per model; searched in this order, then the shipped models.
    folders: Paths = (Path("/var/lib/gpuinfer/models"),)
    #: What a task's error says about an exception in a model: its type, message, file and line; or only that
    #: the model failed. The journal has everything.
    errors: Errors = "full"


class WorkerSettings(Section):
    """One worker."""

    #: auto: the GPU with the worker's number; the CPU only on a host without any GPU.
    device: Literal["auto", "cuda", "cpu"] = "auto"
    #: GPUs by index or UUID; worker N takes the Nth. Empty: all that NVML lists.
    gpus: Names = ()
    #: Workers per GPU: worker N runs on GPU N // per_gpu. One value for the whole host.
    per_gpu: int = Field(default=1, ge=1, le=64)
    #: A worker with more MiB of host memory (RSS) finishes its batch and is restarted; 0: no limit.
    max_memory_mb: int = Field(default=0, ge=0, le=16 * 1024 * 1024)
    #: Models to load and serve. Where the fleet has no default model yet, the first one becomes it.
    models: Names = ("digits",)
    queues: Annotated[tuple[QueueName, ...], BeforeValidator(_split)] = QUEUES
    #: torch's threads for one operation on the CPU; 0 leaves it to torch.
    threads: int = Field(default=0, ge=0, le=1024)
    #: Threads that prepare inputs while the device works; 0: one for each core.
    prepare_threads: int = Field(default=0, ge=0, le=1024)
    #: The longest time for loading and warming up; then systemd times the start out.
    load_timeout_s: int = Field(default=1800, ge=10, le=86400)
    #: An upper bound on the max_batch_size of every model; 0: none.
    max_batch_size: int = Field(default=0, ge=0, le=65536)
    #: Folder of the lock files: one process per worker number.
    run_dir: Path = Path("/run/gpuinfer/worker")

    @field_validator("models")
    @classmethod
    def _some_model(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one model")
        return tuple(dict.fromkeys(value))

    @field_validator("queues")
    @classmethod
    def _some_queue(cls, value: tuple[QueueName, ...]) -> tuple[QueueName, ...]:
        if not value:
            raise ValueError("must name at least one of realtime, default, batch")
        return tuple(name for name in QUEUES if name in value)


class ApiSettings(Section):
    """The HTTP API."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    #: Processes that serve, on one socket. One of them serves some thousand requests a second on one core.
    processes: int = Field(default=1, ge=1, le=64)
    #: The longest wait for a result (?wait=).
    max_wait_s: float = Field(default=60.0, ge=0, le=600)
    #: Retry-After when Redis does not answer, and the least Retry-After when a queue is full.
    retry_after_s: int = Field(default=2, ge=1, le=3600)
    #: The most requests in progress in one process, and the most MiB of bodies that it holds.
    max_requests: int = Field(default=10_000, ge=1, le=1_000_000)
    max_held_mb: int = Field(default=256, ge=1, le=1024 * 1024)
    #: A request is ended when less than 64 KiB of its body, and not its end, arrived within this time.
    body_stall_s: float = Field(default=10.0, ge=0.1, le=3600)
    #: An idle connection is closed after this time; it must be longer than that of a proxy in front.
    keep_alive_s: int = Field(default=75, ge=1, le=86400)
    #: Folder of the keys, one file each, which ``gpuinfer key`` writes.
    keys_dir: Path = Path("/etc/gpuinfer/keys.d")
    #: Networks whose requests need no key: they may predict. Loopback and the Unix socket are not among them.
    anonymous: Networks = ()
    #: Host names that requests without a key may use, besides this host's own name.
    hosts: Hosts = ()
    #: Origins of web pages that may send requests; "*": all.
    cors_origins: Origins = ()
    #: Certificate with its chain, and private key, in PEM, for TLS on TCP sockets; without tls_key the key is
    #: in the file of tls_cert. Both are read again when they change.
    tls_cert: Path | None = None
    tls_key: Path | None = Field(default=None, validate_default=True)

    @field_validator("tls_cert", "tls_key", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("tls_key")
    @classmethod
    def _with_a_certificate(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and info.data.get("tls_cert") is None and "tls_cert" in info.data:
            raise ValueError("must be given with api.tls_cert")
        return value


class MetricsSettings(Section):
    """Metrics for Prometheus."""

    #: "": /metrics of the API. Else a separate address that needs no key: "127.0.0.1:9108", "[::]:9108", or
    #: "unix:/run/gpuinfer/api/metrics.sock".
    listen: str = Field(default="", pattern=r"^(unix:/.+|(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):[0-9]{1,5})?$")
    #: Whether this host shows the metrics of the whole fleet; auto: if Redis runs on it.
    fleet: Literal["auto", "always", "never"] = "auto"

    @field_validator("listen")
    @classmethod
    def _a_port(cls, value: str) -> str:
        if value and not value.startswith("unix:") and int(value.rpartition(":")[2]) > 65535:
            raise ValueError("must have a port of at most 65535")
        return value


class WatcherSettings(Section):
    """The number of workers, and how it is decided."""

    #: target: as many as drain the queues in time; threshold: one more while more than N tasks wait.
    mode: Literal["target", "threshold"] = "target"
    #: act: start and stop workers; log: only log what would be done. Tasks of dead workers are put back in
    #: both.
    decisions: Literal["act", "log"] = "act"
    #: systemd: units over D-Bus; process: plain child processes.
    backend: Literal["systemd", "process"] = "systemd"
    probe_interval_s: float = Field(default=1.0, ge=0.1, le=60)
    #: Instances of this host; 0: worker.per_gpu for each GPU, and one on a host without a GPU.
    instances: int = Field(default=0, ge=0, le=1024)
    #: The least and the most workers that run, on all hosts together; ceiling 0: all instances. The floor is
    #: distributed, one worker at a time, over the groups of workers that serve the same models and queues.
    floor: int = Field(default=0, ge=0, le=100_000)
    ceiling: int = Field(default=0, ge=0, le=100_000)
    #: The time in which a queue's backlog must drain, counted from when a worker started now would be ready.
    realtime_target_s: float = Field(default=2.0, ge=0.1, le=86400)
    default_target_s: float = Field(default=5.0, ge=0.1, le=86400)
    batch_target_s: float = Field(default=120.0, ge=0.1, le=86400)
    #: The share of time that a worker should be busy under steady load.
    utilisation: float = Field(default=0.8, ge=0.2, le=0.89)
    #: Tasks a second of one worker, and seconds from start to ready, until they are measured.
    assumed_rate: float = Field(default=10.0, gt=0, le=1e6)
    assumed_startup_s: float = Field(default=15.0, ge=0, le=3600)
    #: A worker is stopped after it was not needed for this long; doubled when a start soon follows a stop.
    cooldown_s: float = Field(default=60.0, ge=1, le=86400)
    cooldown_max_s: float = Field(default=180.0, validate_default=True, ge=1, le=7 * 86400)
    #: threshold mode: more waiting tasks than this start one more worker; the most workers; the interval.
    threshold_depth: int = Field(default=50, ge=0, le=10**9)
    threshold_workers: int = Field(default=4, ge=1, le=100_000)
    threshold_every_s: float = Field(default=10.0, ge=0.1, le=3600)
    #: A worker that was started by hand is not stopped for this long; a stop by hand holds until a start, an
    #: enable or a boot.
    manual_hold_s: float = Field(default=900.0, ge=0, le=7 * 86400)
    #: A failed instance is not started for this long, twice as long after each further failure, up to the
    #: maximum; without a failure for as long as that, all are forgotten.
    quarantine_s: float = Field(default=30.0, ge=1, le=86400)
    quarantine_max_s: float = Field(default=3600.0, validate_default=True, ge=1, le=7 * 86400)
    #: No worker is started on a GPU on which other programs hold more MiB than this.
    foreign_mb: int = Field(default=1024, ge=0, le=1024 * 1024)
    #: A worker's tasks are put back when it and its host's watcher were silent for this long; 0: never.
    reap_after_s: float = Field(default=120.0, ge=0, le=7 * 86400)

    @field_validator("reap_after_s")
    @classmethod
    def _longer_than_a_heartbeat(cls, value: float) -> float:
        if 0 < value < LEAST_REAP_S:
            raise ValueError(f"must be 0, or at least {LEAST_REAP_S}: workers send a heartbeat every 5 s")
        return value

    @field_validator("ceiling", "cooldown_max_s", "quarantine_max_s")
    @classmethod
    def _not_below(cls, value: float, info: ValidationInfo) -> float:
        name = {"ceiling": "floor", "cooldown_max_s": "cooldown_s", "quarantine_max_s": "quarantine_s"}
        low = name[str(info.field_name)]
        if value < info.data.get(low, value) and not (info.field_name == "ceiling" and value == 0):
            raise ValueError(f"must be at least {low} = {info.data[low]:g}")
        return value


class LogSettings(Section):
    """What is logged, and in which format."""

    #: auto: the journal under systemd, colours on a terminal, JSON lines elsewhere.
    format: Literal["auto", "console", "json", "journal"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"
    #: trouble: requests that succeed are counted, in one line a minute; all: every request has a line.
    requests: Literal["trouble", "all"] = "trouble"
    #: Up to this many tasks a second of one worker, batch lines name the tasks; above it, a summary a second.
    named_tasks: float = Field(default=50.0, ge=0, le=1e6)
    #: A task that runs longer than this is always named.
    slow_s: float = Field(default=10.0, gt=0, le=86400)
