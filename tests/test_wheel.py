"""The wheel holds the three packages and the configs and the kernels' block sizes, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_wheel_contents(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"llminfer", "pallas_kernels", "sharding", info}
    assert {f"llminfer/configs/{path.name}" for path in (ROOT / "configs").glob("*.toml")} <= set(names)
    assert "pallas_kernels/tuned.toml" in names
    assert f"{info}/licenses/LICENSE" in names
    sources = {str(path.relative_to(ROOT)) for top in ("llminfer", "pallas_kernels", "sharding") for path in (ROOT / top).rglob("*.py")}
    assert sources <= set(names)
    assert not [name for name in names if "__pycache__" in name or "test" in name]
