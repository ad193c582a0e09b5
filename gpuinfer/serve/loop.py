# SPDX-License-Identifier: Apache-2.0
"""The main loop of ``gpuinfer serve``: starts the processes, prints what happens, reloads a changed model."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from gpuinfer.demo.private import cleaning_up, private_folder
from gpuinfer.demo.screen import screen_for
from gpuinfer.demo.stack import Plan
from gpuinfer.errors import GpuinferError
from gpuinfer.models.repository import ModelFolder
from gpuinfer.models.source import Source, changed, example_of
from gpuinfer.serve.session import CHECK_S, Session
from gpuinfer.serve.show import command, user_paths
from gpuinfer.serve.words import Words


def run(source: Source, devices: Plan, console: Console, port: int, *, reload: bool) -> None:
    """Serve until Ctrl-C, then clean up. Raises GpuinferError if the model cannot be served."""
    folder = private_folder("gpuinfer-serve-")
    words = Words(console, lambda text: user_paths(text, folder / "models", source))
    screen = screen_for(console)
    session = Session(folder, devices, screen.service, words)
    with cleaning_up(session):
        loop = _Loop(source, session, words, reload=reload)
        try:
            try:
                loop.start(port)
            finally:
                screen.close()
                session.poll()
            loop.watch()
        except KeyboardInterrupt:
            words.say("stopping ...")


class _Loop:
    def __init__(self, source: Source, session: Session, words: Words, *, reload: bool) -> None:
        self._source, self._session, self._words, self._reload = source, session, words, reload
        self._seen = source.state()
        self._model: ModelFolder | None = None
        self._begun = time.monotonic()
        self._shown = False
        #: Whether it was printed that the worker has ended.
        self._down = False

    def start(self, port: int) -> None:
        """Start, and wait until the model is served. With reload, also return if the model has failed."""
        while not self._link():
            self._await_change()
        assert self._model is not None  # noqa: S101  _link has just set it
        self._session.start(port, self._model.manifest.name)
        while not self._session.poll():
            if self._ended():
                return
            time.sleep(CHECK_S)
        self._show()

    def watch(self) -> None:
        """Print what happens, and reload the model when it has changed. Ends only by an exception."""
        while True:
            time.sleep(CHECK_S)
            if self._session.poll():
                self._show()
            self._words.flush()
            self._ended()
            if self._reload and self._has_changed() and self._link():
                assert self._model is not None  # noqa: S101  _link has just set it
                self._down = False
                self._session.start_worker(self._model.manifest.name)

    def _link(self) -> bool:
        """Link the model's current files. With reload, print an error and return False."""
        self._begun = time.monotonic()
        self._seen = self._source.state()
        try:
            self._model = self._source.link(self._session.folder / "models")
        except GpuinferError as exc:
            if not self._reload:
                raise
            self._words.say(f"{exc}; waiting for a change", "red")
            return False
        return True

    def _ended(self) -> bool:
        """Tell whether the worker has ended by itself. Without reload, raise ProcessEnded if so."""
        if self._session.worker_ended is None:
            return False
        if not self._reload:
            self._session.poll()
            self._session.check_worker()
        if not self._down:
            self._down = True
            self._words.say("not served; waiting for a change", "red")
        return True

    def _await_change(self) -> None:
        while not self._has_changed():
            time.sleep(CHECK_S)

    def _has_changed(self) -> bool:
        """Tell whether files have changed; if so, first wait until they stop changing."""
        now = self._source.state()
        names = changed(self._seen, now)
        if not names:
            return False
        while True:
            time.sleep(CHECK_S)
            later = self._source.state()
            if later == now:
                break
            now = later
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        self._words.say(f"changed: {', '.join(names[:3])}{more}; loading")
        return True

    def _show(self) -> None:
        """Print where the model is served, and the first time a command to try it."""
        assert self._model is not None  # noqa: S101  a worker serves it
        took = time.monotonic() - self._begun
        name, url = self._model.manifest.name, self._session.url
        self._words.say(f"\n{name} at {url}, ready after {took:.1f} s", "bold")
        if self._shown:
            return
        self._shown = True
        self._try_it(url, self._session.folder / "example.json")
        self._words.say(f"\nAll of the API: {url}/docs; Ctrl-C ends it, and leaves nothing behind.")

    def _try_it(self, url: str, scratch: Path) -> None:
        assert self._model is not None  # noqa: S101  a worker serves it
        value = example_of(self._model)
        if value is None:
            what = "attribute `example`" if self._model.manifest.format == "python" else "inputs' `example`"
            self._words.say(f"Try it; give it an {what}, and an input is shown here:\n")
        else:
            self._words.say("Try it:\n")
        self._words.say("  " + command(url, value, scratch))
