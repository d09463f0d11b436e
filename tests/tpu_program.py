"""Programs that compile for a TPU on this machine, each in a process of its own: libtpu reads its environment once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from llminfer.bench.kernels import AOT


def run_program(program: str, *arguments: object, cwd: Path | None = None) -> str:
    """Runs Python source with what it gives as sys.argv[1:], and with nothing but the root to import from; its output. Fails as it does."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = {**os.environ, **AOT, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
