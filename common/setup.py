"""`make setup`: installs the course's packages into .venv, once, and checks quickly whether that is up to date.

Every command that needs packages calls `ensure` first. At its very end an installation writes .venv/course.json. If
that file fits pyproject.toml, there is nothing to do. If it is absent, because an installation was interrupted, pip
runs again and keeps what is already installed.

`COURSE_PYTHON=here` in the environment, or `--here` after the command, does not touch .venv and uses the Python that
runs this, for users with an environment of their own.

Like `common/__main__.py`, this file must run on a bare Python.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
VERSIONS = ["3.11", "3.12", "3.13", "3.14"]
"""The versions of Python for which torch is built."""
SUPPORTED = f"{VERSIONS[0]} to {VERSIONS[-1]}"
UV = "uv==0.13.9"


class SetupError(Exception):
    """The environment could not be made; the text says why and what to do."""


def venv() -> Path:
    return ROOT / ".venv"


def venv_python() -> Path:
    return venv() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def stamp_file() -> Path:
    return venv() / "course.json"


def inside() -> bool:
    """Whether this process runs on .venv's Python."""
    return os.path.realpath(sys.prefix) == os.path.realpath(venv())


def requirements() -> str:
    """A hash of all that an environment depends on: pyproject.toml up to the settings of the tools, and the path of
    this folder, to which the environment refers.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\n[tool.pytest")[0]
    return hashlib.sha256(f"{ROOT}\n{text}".encode()).hexdigest()


def read_stamp() -> dict:
    """The content of .venv/course.json, which says what is installed; {} if there is no usable one."""
    try:
        stamp = json.loads(stamp_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    fits = isinstance(stamp, dict) and isinstance(stamp.get("extras"), list)
    return stamp if fits and venv_python().exists() else {}


def asked_build() -> str:
    """The build of torch that TORCH names: "cpu", "cuda", or "" for none. Only Linux has two builds."""
    choice = os.environ.get("TORCH", "")
    if choice not in ("", "cpu", "cuda"):
        raise SetupError(f"TORCH is {choice!r}; it must be cpu or cuda.")
    return choice if sys.platform == "linux" else ""


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU and its driver. In WSL only nvidia-smi knows it."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    try:
        found = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and b"GPU 0" in found.stdout


def fits(stamp: dict, extra: str) -> bool:
    """Whether what `read_stamp` returned is up to date and has this extra and the build of torch that TORCH names."""
    return (
        stamp.get("requirements") == requirements()
        and (not extra or extra in stamp["extras"])
        and asked_build() in ("", stamp.get("torch"))
    )


# --- Which Python -----------------------------------------------------------------------------------------------------


def this_version() -> str:
    return "{}.{}".format(*sys.version_info)


def suitable_python() -> str:
    """The path of a Python that torch is built for: this one, or another on the PATH. Raises SetupError for none."""
    if this_version() in VERSIONS:
        return getattr(sys, "_base_executable", None) or sys.executable
    for version in reversed(VERSIONS):
        found = shutil.which(f"python{version}")
        # A version manager may have a name on the PATH that does not run.
        if found and subprocess.run([found, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0:
            return found
    raise SetupError(
        f"This is Python {this_version()}; the course needs {SUPPORTED}, for which torch is built. "
        "Install one of them and name it: make PYTHON=python3.13"
    )


def check_modules(python: str) -> None:
    """Raise SetupError if a Python has no `venv`, which is a package of its own in some Linux distributions."""
    for module in ("venv", "ensurepip"):
        if subprocess.run([python, "-c", f"import {module}"], stderr=subprocess.DEVNULL).returncode:
            raise SetupError(
                f"This Python lacks its module {module}, which makes environments. On Debian and Ubuntu: "
                f"sudo apt install python3-venv (or python{this_version()}-venv)"
            )


# --- Installing -------------------------------------------------------------------------------------------------------


def install(extra: str) -> None:
    """Install what pyproject.toml and `extra` name into .venv. Raises SetupError if that fails."""
    before = read_stamp()
    extras = sorted({*before.get("extras", []), extra} - {""})
    build = asked_build() or before.get("torch")
    if not build:  # CUDA's packages have gigabytes, and are useless without a GPU
        build = "cpu" if sys.platform == "linux" and not has_gpu() else "cuda"
    swap_torch = build != before.get("torch", build)
    if stamp_file().exists():
        stamp_file().unlink()
    if swap_torch or version_of(venv_python()) not in VERSIONS:
        if inside():
            raise SetupError(f"The environment in {venv()} no longer fits its Python. Remove it and run this again.")
        python = suitable_python()
        check_modules(python)
        say(f"Making an environment in {venv()} ...")
        run([python, "-m", "venv", "--clear", str(venv())], "could not make the environment")
    say("Installing the course's packages: a minute or two, once.")
    if build == "cpu":
        with beside(pip("install", *lighter_packages())):
            install_cpu_torch()
    wanted = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    run(pip("install", "--editable", wanted), "pip could not install the packages")
    stamp = {
        "requirements": requirements(),
        "extras": extras,
        "torch": build,  # what was tried first
        "python": version_of(venv_python()),
    }
    stamp_file().write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


def lighter_packages() -> list[str]:
    """The requirements of the course without torch. None of them needs torch."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    return [each for each in re.findall(r'^ +"([^"]+)"', needed, re.MULTILINE) if not each.startswith("torch")]


@contextlib.contextmanager
def beside(command: list[str]) -> Iterator[None]:
    """Run an installer at the same time as the block. It may fail: a later one installs what it has not."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=surroundings()
    )
    try:
        yield
        process.wait()
    finally:
        process.kill()
        process.wait()


def pip(*arguments: str) -> list[str]:
    return [str(venv_python()), "-m", "pip", "--disable-pip-version-check", *arguments]


def install_cpu_torch() -> None:
    """Install torch without CUDA on Linux, where the package index has only the build with CUDA.

    pip may be configured to find a wheel on this disk, which needs no network. Otherwise uv knows where the CPU builds
    are. If both fail, pip will install the index's build later, which works on a CPU as well.
    """
    pinned = re.search(r'"(torch==[^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    try:
        return run(pip("install", "--no-index", "--no-deps", pinned), "pip found no torch on this disk")
    except SetupError:
        pass
    try:
        run(pip("install", UV), "pip could not install uv")
        uv = [str(venv_python()), "-m", "uv", "pip", "install", "--python", str(venv_python())]
        run([*uv, "--no-deps", "--torch-backend=cpu", pinned], "uv could not install torch's CPU build")
    except SetupError:
        say("torch's CPU build cannot be reached from here. pip takes the package index's build, which may be larger.")


def run(command: list[str], failure: str) -> None:
    """Run an installer. A terminal shows its output on one line. Raises SetupError, which quotes it, if it fails."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=surroundings(),
        encoding="utf-8",
        errors="replace",
    )
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if sys.stdout.isatty() and line.strip():
                print(f"\r\033[K{line.strip()[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
    finally:
        if sys.stdout.isatty():
            print("\r\033[K", end="", flush=True)
        if process.poll() is None:
            try:
                process.wait(timeout=10)  # Ctrl-C has reached it, too
            except subprocess.TimeoutExpired:
                process.kill()
    if process.wait() != 0:
        raise SetupError(explain(failure, lines))


def surroundings() -> dict[str, str]:
    """The environment of an installer."""
    environment = {**os.environ, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONPATH", None)
    return environment


def explain(failure: str, lines: list[str]) -> str:
    """The text of an error: what failed, the installer's last lines, and advice if the cause is known."""
    text = "\n".join(lines)
    unreachable = re.search(
        r"resolve|connection|unreachable|timed out|proxy|\(from versions: none\)|dns error", text, re.IGNORECASE
    )
    advice = ""
    if unreachable:
        advice = "\nAre you offline? Packages come from the network, once; then no command needs it. Try again."
    elif "No space left" in text:
        advice = "\nThe disk is full: the packages take about 1.5 GB, and several more with TORCH=cuda."
    said = [line.strip() for line in lines if line.strip()]
    # pip ends with remarks about itself; its errors are shown instead, if there are any.
    errors = [line for line in said if re.match(r"(ERROR|error): (?!subprocess-exited|Exception:)", line)]
    quoted = "\n".join(f"    {line}" for line in (errors or said)[-6:])
    return f"{failure}:\n{quoted}{advice}"


def version_of(python: Path) -> str:
    """The version of a virtual environment's Python, or "" if it does not run, as after an upgrade of the system's
    Python, or has no pip.
    """
    if not python.exists():
        return ""
    command = [str(python), "-c", "import pip, sys; print('{}.{}'.format(*sys.version_info))"]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.strip()


def say(text: str) -> None:
    print(text, flush=True)


# --- From any Python into .venv's -------------------------------------------------------------------------------------


def ensure(extra: str, argv: list[str]) -> None:
    """Install what a command needs, and continue in .venv's Python.

    extra: the extra of pyproject.toml, or "". Returns if this is the right Python. Otherwise it starts that one with
    `python -m common *argv` and does not return. Raises SetupError.
    """
    if os.environ.get("COURSE_PYTHON") == "here":
        if this_version() not in VERSIONS:
            suitable_python()
            say(f"Note: this is Python {this_version()}; the course is tested on {SUPPORTED}.")
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return  # torchrun has started several processes, in the right Python, and they must not all install
    stamp = read_stamp()
    if not fits(stamp, extra) or (inside() and stamp.get("python") != this_version()):
        install(extra)
    if inside():
        os.environ.pop("COURSE_ENTERED", None)
    else:
        enter(argv)


def enter(argv: list[str]) -> None:
    """Start `python -m common *argv` with .venv's Python in place of this process. Never returns."""
    if os.environ.pop("COURSE_ENTERED", ""):
        raise SetupError(f"{venv_python()} does not run from {venv()}. Remove that folder and run this again.")
    command = [str(venv_python()), "-m", "common", *argv]
    environment = {**os.environ, "COURSE_ENTERED": "1"}
    sys.stdout.flush()
    if os.name == "nt":  # on Windows exec returns to the shell at once
        sys.exit(subprocess.run(command, env=environment).returncode)
    os.execve(command[0], command, environment)


def main(argv: list[str]) -> int:
    """`make setup`, or `python -m common setup EXTRA` for dev, book, lab, serve, cluster, triton or hub."""
    extra = argv[0] if argv else ""
    if extra not in ("", "dev", "book", "lab", "serve", "cluster", "triton", "hub"):
        names = "dev, book, lab, serve, cluster, triton and hub"
        print(f"There is no extra {extra!r}: {names} are in pyproject.toml.", file=sys.stderr)
        return 2
    try:
        if fits(read_stamp(), extra):
            say(f"{venv()} is up to date.")
        else:
            install(extra)
            say("Done. `make run` lets a real model answer; `make help` lists what else there is.")
    except SetupError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
