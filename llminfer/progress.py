"""Progress of long host work (reading, downloading, compiling). Callers pass an object with `task`; None is silent.
Imports no jax."""

from __future__ import annotations

import sys
from typing import Any, Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, n: float) -> None:
        """Says that `n` more units are done. May be called from any thread."""
        ...

    def done(self) -> None:
        """Ends the task; its line stays on the screen as finished."""
        ...


class Progress(Protocol):
    """Where tasks are shown."""

    def task(self, description: str, total: float | None) -> Task:
        """Starts a task of `total` units; None when the amount is not known."""
        ...


class _Silent:
    def advance(self, n: float) -> None:
        """Shows nothing."""

    def done(self) -> None:
        """Shows nothing."""


def start(progress: Progress | None, description: str, total: float | None) -> Task:
    """`progress.task(description, total)`, or a silent task when `progress` is None."""
    return _Silent() if progress is None else progress.task(description, total)


class _RichTask:
    def __init__(self, bars: Any, number: Any) -> None:
        self._bars, self._number = bars, number

    def advance(self, n: float) -> None:
        self._bars.advance(self._number, n)

    def done(self) -> None:
        # A task without a total, or one that counted less than it expected, ends full as well.
        self._bars.update(self._number, total=1, completed=1)


class RichProgress:
    """Bars on stderr; use it as a context manager. Silent when stderr is not a terminal, and outside the `with`. Example:
    `with RichProgress() as progress: open_model("demo", progress=progress)`."""

    def __init__(self) -> None:
        self._bars: Any = None

    def __enter__(self) -> RichProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=Console(stderr=True))
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def task(self, description: str, total: float | None) -> Task:
        if self._bars is None:
            return _Silent()
        return _RichTask(self._bars, self._bars.add_task(description, total=total))
