# SPDX-License-Identifier: Apache-2.0
"""The course of ``gpuinfer serve``: link, start, show, and load anew what has changed."""

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
from gpuinfer.serve.session import LOOK_S, Session
from gpuinfer.serve.show import as_theirs, command
from gpuinfer.serve.words import Words


def run(source: Source, devices: Plan, console: Console, port: int, *, reload: bool) -> None:
    """Serve until Ctrl-C; in the end nothing is left. Raises what keeps it from serving."""
    folder = private_folder("gpuinfer-serve-")
    words = Words(console, lambda text: as_theirs(text, folder / "models", source))
    screen = screen_for(console)
    session = Session(folder, devices, screen.service, words)
    with cleaning_up(session):
        loop = _Loop(source, session, words, reload=reload)
        try:
            try:
                loop.start(port)
            finally:
                screen.close()
                session.look()
            loop.go_on()
        except KeyboardInterrupt:
            words.say("ending ...")


class _Loop:
    def __init__(self, source: Source, session: Session, words: Words, *, reload: bool) -> None:
        self._source, self._session, self._words, self._reload = source, session, words, reload
        self._seen = source.state()
        self._model: ModelFolder | None = None
        self._begun = time.monotonic()
        self._shown = False
        #: The worker has ended by itself, and that was told.
        self._down = False

    def start(self, port: int) -> None:
        """Link and start, and wait until the model serves; with reload, or until it has failed."""
        while not self._link():
            self._await_change()
        assert self._model is not None  # noqa: S101  _link has just set it
        self._session.start(port, self._model.manifest.name)
        while not self._session.look():
            if self._ended():
                return
            time.sleep(LOOK_S)
        self._show()

    def go_on(self) -> None:
        """Tell what happens, and load the model anew when it has changed. Ends by an exception."""
        while True:
            time.sleep(LOOK_S)
            if self._session.look():
                self._show()
            self._words.flush()
            self._ended()
            if self._reload and self._has_changed() and self._link():
                assert self._model is not None  # noqa: S101  _link has just set it
                self._down = False
                self._session.start_worker(self._model.manifest.name)

    def _link(self) -> bool:
        """Link the model as it is now. With reload, an error is told, and False returned."""
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
        """Tell whether the worker has ended by itself. Raises ProcessEnded where no change is waited for."""
        if self._session.worker_ended is None:
            return False
        if not self._reload:
            self._session.look()
            self._session.check_worker()
        if not self._down:
            self._down = True
            self._words.say("not served; waiting for a change", "red")
        return True

    def _await_change(self) -> None:
        while not self._has_changed():
            time.sleep(LOOK_S)

    def _has_changed(self) -> bool:
        """Tell whether files have changed, and have been left alone for a moment since."""
        now = self._source.state()
        names = changed(self._seen, now)
        if not names:
            return False
        while True:
            time.sleep(LOOK_S)
            later = self._source.state()
            if later == now:
                break
            now = later
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        self._words.say(f"changed: {', '.join(names[:3])}{more}; loading")
        return True

    def _show(self) -> None:
        """Print where the model is served, and, at first, a command to try it."""
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
