"""Runs PEFT's layers in a process of their own."""

import json
import os
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parent


def run_oracle(given, oracle="peft_layers_oracle.py"):
    """Return what an oracle writes for what it is given, both as plain data."""
    run = subprocess.run(
        [sys.executable, str(FOLDER / oracle)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
