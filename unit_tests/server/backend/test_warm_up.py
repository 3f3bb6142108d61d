"""What a GPU's server compiles, it compiles before the first request."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "mtp_step"), [("0.8B", 0), ("27B", 3), ("35B-A3B", 1)])
def test_no_request_is_the_first_to_launch_a_kernel(preset: str, mtp_step: int) -> None:
    command = [sys.executable, "-m", "unit_tests.server.backend.warm_up_check", preset, str(mtp_step)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""
