"""`make clean`. Standard library only, since nothing needs to be installed for it."""

from __future__ import annotations

import shutil

from common.course import LESSONS, ROOT


def main(argv: list[str]) -> int:
    """Remove what can be made again in seconds. The environment, models and a student's work are not of that kind."""
    roots = [ROOT / "common", ROOT / "solutions", *(lesson.folder for lesson in LESSONS)]
    caches = [ROOT / name for name in (".pytest_cache", ".ruff_cache", ".hypothesis", "__pycache__")]
    for root in roots:
        for name in ("__pycache__", ".pytest_cache", ".ipynb_checkpoints"):
            caches += root.rglob(name)
    for cache in caches:
        shutil.rmtree(cache, ignore_errors=True)
    return 0
