"""What a long run shows on stderr: on a terminal a bar, else a line for each job."""

import signal
import threading
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar(Progress):
    """Of ``jobs`` with so many ``steps`` in all. Use with ``with``; ``begin`` each job, ``step`` by step. Meanwhile SIGTERM is as Ctrl-C:
    what a scheduler or ``timeout`` ends shows what was measured, too."""

    def __init__(self, jobs: int, steps: int, title: str = "") -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=Console(stderr=True), transient=True)
        self._jobs, self._begun = jobs, 0
        self._task: TaskID = self.add_task(title, total=steps)
        self._ended = ExitStack()

    def __enter__(self) -> "Bar":
        super().__enter__()
        ends_at_once = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # else somebody has decided otherwise
        if ends_at_once and threading.current_thread() is threading.main_thread():  # only there signals can be handled
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            self._ended.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)
        return self

    def __exit__(self, *exception: Any) -> None:
        with self._ended:
            super().__exit__(*exception)

    def begin(self, title: str, done: int) -> None:
        """A job, before which there were ``done`` steps."""
        self._begun += 1
        self.update(self._task, description=title, completed=done)
        if not self.console.is_terminal:
            self.console.print(f"{self._begun} of {self._jobs}: {title}")

    def step(self) -> None:
        self.advance(self._task)
