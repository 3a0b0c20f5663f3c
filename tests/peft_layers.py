"""Runs `peft_layers_oracle.py` in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

ORACLE = pathlib.Path(__file__).parent / "peft_layers_oracle.py"


def run_oracle(cases):
    """Return the outputs of PEFT's layers, as lists."""
    run = subprocess.run(
        [sys.executable, str(ORACLE)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
