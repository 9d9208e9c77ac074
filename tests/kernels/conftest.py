import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_script():
    """Runs a script of this folder in a process of its own, since Triton decides to interpret when it is imported.

    Its first argument is a file in a folder of the test's, which also gets Triton's cache.
    """

    def run(script: str, *arguments) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        cache = Path(arguments[0]).parent / "cache"
        environment |= {"TRITON_CACHE_DIR": str(cache), "DENIM_NOISE": "eager", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "error::RuntimeWarning", Path(__file__).parent / script, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return run
