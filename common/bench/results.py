"""The measurements that are kept, each in a JSON file with the circumstances under which it was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.machine import circumstances

MEASUREMENTS = Path(__file__).resolve().parent / "measurements"


def save(folder: Path, name: str, command: str, result: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**circumstances(command), **result}, indent=2, default=str)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def read(name: str, folder: Path = MEASUREMENTS) -> dict:
    """A measurement by its name. Raises FileNotFoundError if there is none."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def show_table(columns: Sequence[str], groups: dict[str, dict[str, list[str]]]) -> None:
    """Print results as a table: for each group its name, then a row of cells for each way that was measured."""
    table = Table(box=None, header_style="dim", padding=(0, 1))
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, rows in groups.items():
        table.add_row(f"[bold]{name}[/]")
        for way, cells in rows.items():
            table.add_row("  " + way, *cells)
    Console(width=120).print(table)
