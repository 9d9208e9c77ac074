"""A signal to a run with workers, as a terminal and a job scheduler send it: to the whole group of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from denim.nim.saving import latest_checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_ends_a_run_with_a_checkpoint(tmp_path, number):
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # this test may run in background
    words = [
        *("pretrain", "--out", str(tmp_path / "run"), "--preset", "micro", "--epochs", "500", "--warmup-epochs", "0"),
        *("--batch-size", "64", "--img-size", "8", "--patch-size", "4", "--crop-scale", "None", "--log-every", "1"),
        *("--checkpoint-every", "1000000", "--workers", "2", "--loader", "torch", "--device", "cpu"),
    ]
    script = f"{heed}; import sys; sys.argv[0] = 'denim'; from denim.cli import run; run()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.1)
        os.killpg(process.pid, number)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + number, said
    last = said.splitlines()[-1]
    assert last.startswith(f"denim: stopped by {number.name}; "), said
    assert "--resume goes on there" in last
    assert int(latest_checkpoint(tmp_path / "run").name) == len(metrics.read_text().splitlines())
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker outlives the run")
