from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run_python(code: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """What the code prints in a fresh interpreter, which has to end well. ``env``: instead of this process's."""
    environment = dict(env or os.environ) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
