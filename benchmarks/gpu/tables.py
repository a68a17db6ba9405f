"""Tables and progress with rich, or plainly without it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column is text, the others line up at the right."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = [[cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))] for row in rows]
        head = [column.ljust(width) for column, width in zip(columns, widths, strict=True)]
        print(f"\n{title}", *("  ".join(line) for line in [head, *lines]), sep="\n")
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console = console if console.is_terminal else Console(width=160)  # a file has no width
    console.print(table)


def progress(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    """The items as they come."""
    try:
        from rich.progress import track
    except ImportError:
        yield from items
        return
    yield from track(items, title, total, transient=True)
