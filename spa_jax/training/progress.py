"""Progress bars, drawn on a terminal only."""

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(**columns: str) -> Progress:
    """Makes a bar with count, time left and one field for each keyword: name of the field -> label shown before it."""
    fields = [TextColumn(f"{label} {{task.fields[{name}]}}") for name, label in columns.items()]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *fields,
        TimeRemainingColumn(),
        transient=True,
        disable=not rich.get_console().is_terminal,
    )
