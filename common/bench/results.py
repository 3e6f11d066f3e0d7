"""The measurements that are kept: a JSON file each, with the circumstances under which it was made."""

from __future__ import annotations

import json
from pathlib import Path

from common.machine import circumstances

MEASUREMENTS = Path(__file__).resolve().parent / "measurements"


def save(folder: Path, name: str, command: str, result: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**circumstances(command), **result}, indent=2, default=str)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def read(name: str, folder: Path = MEASUREMENTS) -> dict:
    """A measurement by its name. Raises FileNotFoundError if there is none."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
