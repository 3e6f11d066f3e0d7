"""A progress bar in the terminal, for work that takes long enough to watch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def progress_bar(what: str, total: float, shown: bool = True) -> Iterator[Callable[[float, str], None]]:
    """A bar that disappears at the end. Yields `update(done, note)`: how many of `total` are done, and a few words."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(TextColumn("{task.description}"), *columns, disable=not shown, transient=True) as bar:
        task = bar.add_task(what, total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)
