"""`make clean`. It imports only the standard library, so that it works before anything is installed."""

from __future__ import annotations

import shutil

from common.course import LESSONS, ROOT


def main(argv: list[str]) -> int:
    """Remove the caches, but not the environment, the models or a student's work."""
    roots = [ROOT / "common", ROOT / "solutions", *(lesson.folder for lesson in LESSONS)]
    caches = [ROOT / name for name in (".pytest_cache", ".ruff_cache", ".hypothesis", "__pycache__")]
    for root in roots:
        for name in ("__pycache__", ".pytest_cache", ".ipynb_checkpoints"):
            caches += root.rglob(name)
    for cache in caches:
        shutil.rmtree(cache, ignore_errors=True)
    return 0
