"""Sections that are run by their own names load the BLAS themselves: nothing may have imported mlx by then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_sections_that_load_the_blas_do_so_before_mlx_is_imported() -> None:
    files = (ROOT / "benchmarks" / "sections").rglob("*.py")
    own = [file for file in files if "load_fast_blas()" in file.read_text(encoding="utf-8")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in own]
    assert len(names) >= 5
    imported = "\n".join(f"import {name}" for name in names)
    code = f"import sys\n{imported}\nprint('mlx.core' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split()[-1] == "False", names
