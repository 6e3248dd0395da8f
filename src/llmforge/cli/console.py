"""What people look at: tables on stdout, progress and status on stderr, with rich.

rich is imported as it is needed: JSON output and plain text do without. It honours NO_COLOR.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from llmforge.cli.launch import current_job, is_speaker
from llmforge.cli.streams import takes_all_characters

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from llmforge.artifact import Progress

# Tables are as wide as they need to be where nobody's terminal limits them.
_PIPED_WIDTH = 1000


def status(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr, flush=True)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON for stdout, readable where its encoding allows."""
    return json.dumps(value, indent=indent, ensure_ascii=not takes_all_characters())


def print_json(value: Any) -> None:
    print(json_text(value, indent=2), flush=True)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    right: Sequence[int] = (),
    file: TextIO | None = None,
) -> None:
    """A table on stdout (or `file`). Columns whose numbers are in `right` are aligned there."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title) if title else None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_header=any(columns),
        pad_edge=False,
    )
    for number, column in enumerate(columns):
        table.add_column(
            Text(column), justify="right" if number in right else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    file = file or sys.stdout
    # mpirun gives ranks a pseudo-terminal as stdout, wherever their output really goes.
    if file.isatty() and current_job() is None:
        Console(file=file).print(table)
        return
    console = Console(width=_PIPED_WIDTH, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    lines = (line.rstrip() for line in capture.get().splitlines())
    print("\n".join(lines), file=file, flush=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """A `Progress` to hand to long work: bars with bytes, rate and time left on a terminal, else
    a line at each part's start and end. Quiet on ranks other than 0."""
    if not is_speaker():
        yield lambda label, done, total: None
        return
    shown: _Lines | _Bars = _Bars() if sys.stderr.isatty() else _Lines()
    try:
        yield shown.update
    finally:
        shown.close()


class _Lines:
    """Progress for a log file."""

    def __init__(self) -> None:
        self._label = ""
        self._started = 0.0
        self._done = self._total = 0

    def update(self, label: str, done: int, total: int) -> None:
        from llmforge.artifact import size_text

        if label != self._label:
            self.close()
            self._label, self._started = label, time.perf_counter()
            status(f"{label}: {size_text(total)}")
        self._done, self._total = done, total

    def close(self) -> None:
        if self._label and self._done >= self._total:
            status(f"{self._label}: done in {time.perf_counter() - self._started:.1f} s")
        self._label = ""


class _Bars:
    """Progress for a terminal: a bar for each label."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bars

        self._bars: Bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}
        self._bars.start()

    def update(self, label: str, done: int, total: int) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total, completed=done)
        self._bars.update(self._tasks[label], completed=done, total=total)

    def close(self) -> None:
        self._bars.stop()
