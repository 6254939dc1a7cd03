"""What is installed."""

from rich.table import Table

from titok_fast.cli.common import out
from titok_fast.ops import inspect


def info() -> None:
    """Print versions, instruction sets, and what is available or why not."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (inspect.versions() | inspect.availability()).items():
        table.add_row(f"[bold]{name}[/bold]", value)
    out.print(table)
