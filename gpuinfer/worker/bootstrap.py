# SPDX-License-Identifier: Apache-2.0
"""Starts a worker, in order: settings, device, lock, models, warm-up, queue.

Runs from Celery's ``celeryd_init`` signal, for both ``gpuinfer worker N`` and ``celery -A gpuinfer worker``.
The device is bound before torch is imported.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import orjson
from celery import signals
from celery.platforms import EX_FAILURE, SecurityWarning
from celery.worker import state

from gpuinfer.errors import ConfigError, DeviceError, GpuinferError, TimeLimitExceeded, UnusableRedis
from gpuinfer.gpu_binding import visible_device
from gpuinfer.installed_torch import wrong_torch
from gpuinfer.locks import acquire
from gpuinfer.locks import domain as lock_domain
from gpuinfer.log import configure, flush, get_logger, setup_celery_logging
from gpuinfer.privileges import leave_root
from gpuinfer.queue.connection import connect
from gpuinfer.queue.scripts import read_all
from gpuinfer.queue.store import Store
from gpuinfer.settings import Settings, load_settings
from gpuinfer.worker.ceiling import EX_HARD_LIMIT, Ceiling
from gpuinfer.worker.heartbeat import Pulse, starting
from gpuinfer.worker.loading import load_models
from gpuinfer.worker.openmp import bind_threads
from gpuinfer.worker.process import Process
from gpuinfer.worker.vitals import Vitals

if TYPE_CHECKING:
    from gpuinfer.models.loaded import LoadedModel
    from gpuinfer.worker.batcher import Batcher
    from gpuinfer.worker.task import Task

log = get_logger(__name__)

#: Name of its log in the journal.
PROGRAM = "gpuinfer-worker"
#: Seconds before a thread must release the GIL; Python's default of 5 ms would delay every hand-over.
SWITCH_INTERVAL_S = 0.0005
#: A batch of 256 creates about 10,000 objects and no cycles; Python's default of 700 would collect 20 times.
GC_THRESHOLDS = (20_000, 20, 100)


def on_worker_init(name: str, worker: Any, conf: Any, options: Mapping[str, Any]) -> None:
    """Prepare the worker process ``name`` (``gpu0@host``).

    Exits with the error's exit code if that fails, because Celery would only log an exception and continue.
    """
    # On SIGABRT from systemd's watchdog, write every thread's traceback to the journal.
    faulthandler.enable()
    try:
        settings = getattr(worker.app, "gpuinfer_settings", load_settings)()
        configure(settings.log, program=PROGRAM)
        gpu = number_of(name) // settings.worker.per_gpu
        configure(settings.log, program=PROGRAM, worker=name, gpu=gpu)
        setup_celery_logging(settings.log, program=PROGRAM, worker=name, gpu=gpu)
        _only_solo(conf, options)
        worker.gpuinfer = prepare(settings, name)
    except GpuinferError as exc:
        hint = wrong_torch() if isinstance(exc, DeviceError) else ""
        say_hint = {"hint": hint} if hint else {}
        log.critical("start_failed", worker=name, code=exc.code, reason=str(exc), **say_hint)
        raise SystemExit(exc.exit_code) from None
    # Celery's own warning about root is replaced by ours: see prepare.
    warnings.simplefilter("ignore", SecurityWarning)
    worker.queues_served = settings.worker.queues
    if not options.get("queues"):
        worker.app.amqp.queues.select(settings.worker.queues)
    signals.worker_ready.connect(_ready, weak=False)

    # Celery stops its steps only if all of them have started; without Redis they have not.
    signals.worker_shutdown.connect(
        lambda **_: worker.gpuinfer.drain(crashed=worker.exitcode == EX_FAILURE), weak=False
    )


def _only_solo(conf: Any, options: Mapping[str, Any]) -> None:
    """Refuse any pool except solo."""
    pool = options.get("pool_cls") or options.get("pool") or conf.worker_pool
    name = getattr(pool, "__module__", str(pool)).rpartition(".")[2]
    if name != "solo":
        raise ConfigError(
            f"the pool must be solo, not {name}: CUDA cannot be re-initialised in a forked process, and the "
            "batcher needs the model in the process that reads the queue; run one worker per GPU instead",
            "--pool",
        )


def number_of(name: str) -> int:
    """Return the worker's number in a node name ``gpuN@host``. Raises ConfigError for another name."""
    found = re.match(r"gpu(\d+)@", name)
    if found is None:
        raise ConfigError(
            f"a worker's name must have its number, such as gpu0@{name.partition('@')[2]}", "-n"
        )
    return int(found.group(1))


def prepare(settings: Settings, name: str) -> Process:
    """Leave root, bind the device, take the lock, load and warm up the models, build the batcher."""
    read_all()
    leave_root(lambda text: log.warning("runs_as_root", hint=text))
    binding = visible_device(number_of(name), settings.worker, os.environ)
    if binding.cuda_visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = binding.cuda_visible_devices
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    bind_threads(settings.worker.threads, os.environ)
    lock, domain = acquire(settings.worker.run_dir, name), lock_domain(settings.worker.run_dir)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    began = time.monotonic()
    with starting(settings.worker.load_timeout_s, ", ".join(settings.worker.models)):
        served = load_models(settings, binding.device)
    ceiling = Ceiling(settings.worker.max_memory_mb, name)
    ceiling.check_loaded()
    load_s = time.monotonic() - began
    batcher = _build(settings, name, served.models, binding.device)
    gpu, timeout_s = number_of(name) // settings.worker.per_gpu, settings.broker.connect_timeout_s
    missing = {model: error.message for model, error in served.missing.items()}
    # If the first model is missing, another one must not become the default.
    default = "" if settings.worker.models[0] in missing else None
    pulse = Pulse(
        batcher,
        name,
        gpu,
        domain=domain,
        missing=missing,
        default=default,
        vitals=Vitals(batcher, load_s).read,
        redis_timeout_s=timeout_s,
    )
    return Process(batcher, pulse, lock, domain, ceiling)


def _build(settings: Settings, name: str, loaded: dict[str, tuple[LoadedModel, int]], device: str) -> Batcher:
    from gpuinfer.worker.batcher import Batcher
    from gpuinfer.worker.celery_state import CeleryState
    from gpuinfer.worker.deadline import Deadline
    from gpuinfer.worker.engine import Engine
    from gpuinfer.worker.sizes import Sizes

    def on_fatal(error: GpuinferError) -> None:
        hint = "its tasks return to their queues"
        if isinstance(error, UnusableRedis):
            hint = "nothing was written there"
        elif isinstance(error, DeviceError):
            hint += "; run gpuinfer doctor to find out what is wrong with the GPU and how to fix it"
        log.critical("worker_ends", worker=name, device=device, code=error.code, reason=str(error), hint=hint)
        # systemd restarts the worker; if the GPU is missing then, that start exits with 69.
        flush()
        # EX_IOERR: a device that failed while it worked
        os._exit(os.EX_IOERR if isinstance(error, DeviceError) else error.exit_code)

    # No retries by redis-py: a claim whose answer was lost must not simply be repeated.
    client = connect(settings.broker, retries=0, on_mismatch=on_fatal)
    store = Store(client, name, settings.worker.queues, settings.queue, models=tuple(loaded))
    store.membership.signatures = {
        key: orjson.dumps(model.signature.to_json()) for key, (model, _) in loaded.items()
    }
    store.versions = {key: model.version for key, (model, _) in loaded.items()}

    def on_hard() -> None:
        _end_at_hard_limit(deadline.expired, store)

    models = {key: model for key, (model, _) in loaded.items()}
    deadline = Deadline(on_hard)
    engine = Engine(
        models,
        Sizes({key: fits for key, (_, fits) in loaded.items()}, _most(settings, models)),
        deadline,
        wake=lambda: None,
        threads=settings.worker.prepare_threads,
        errors=settings.models.errors,
    )
    manifests = {key: model.manifest for key, model in models.items()}
    return Batcher(store, engine, manifests, settings, device, CeleryState(name), on_fatal)


def _most(settings: Settings, models: Mapping[str, LoadedModel]) -> dict[str, int]:
    """Return each model's maximum batch size by manifest and settings, regardless of memory."""
    bound = settings.worker.max_batch_size
    most = {
        name: model.manifest.max_batch_size if model.manifest.batchable else 1
        for name, model in models.items()
    }
    return {name: min(size, bound or size) for name, size in most.items()}


def _end_at_hard_limit(tasks: Sequence[Task], store: Store) -> NoReturn:
    """End the process because ``tasks`` exceeded the hard limit, in a pass or in preparing one input.

    A single task fails with TimeLimitExceeded. Several tasks return to the queue, each charged with one
    crash, and run alone next time. Other tasks in the pipeline return without a charge.
    """
    from gpuinfer.worker.outbox import Outbox

    log.critical(
        "hard_time_limit",
        worker=store.worker,
        models=sorted({task.model for task in tasks}),
        limit_s=min((task.hard_limit_s for task in tasks), default=None),
        task_ids=[task.id for task in tasks],
        reason="it exceeded its hard time limit; the process exits",
    )
    flush()  # before the record of what is charged: the main thread may begin another batch meanwhile
    try:
        if len(tasks) == 1:
            (task,) = tasks
            error = TimeLimitExceeded(f"ran longer than its hard limit of {task.hard_limit_s:g} s", None)
            store.settle([Outbox(store).final(task.claimed, error, task.envelope, task)])
        store.note([task.seq for task in tasks])
    except Exception as exc:
        ids = [task.id for task in tasks]
        log.error("settle_failed", task_ids=ids, reason=str(exc))
        flush()
    os._exit(EX_HARD_LIMIT)


def _ready(sender: Any, **_: object) -> None:
    """Report to systemd and the log that the worker is ready."""
    batcher, pulse = sender.controller.gpuinfer.batcher, sender.controller.gpuinfer.pulse
    models = sorted(batcher.models)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, _stop)
    pulse.ready()
    # All current objects live as long as the process: exclude them from garbage collection.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    log.info("worker_ready", worker=batcher.store.worker, models=models, device=batcher.device)


def _stop(number: int, _: object) -> None:
    """Finish the running batch and stop.

    A second Ctrl-C stops at once; the running tasks return to the queue at the next start. SIGQUIT is treated
    as SIGTERM, because Celery's cold shutdown would interrupt a task in the solo pool. Nothing is logged
    here: the signal may have interrupted a write to the log.
    """
    if state.should_stop is not None and number == signal.SIGINT:
        os._exit(128 + signal.SIGINT)
    state.should_stop = 0
