"""The examples run, as their own processes, in their smallest form."""

import json
import os
import pathlib
import runpy
import subprocess
import sys

from helpers import BACKEND

ROOT = pathlib.Path(__file__).parents[1]


def run(script, *arguments):
    process = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        env={**os.environ, "KERAS_BACKEND": BACKEND},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_demo(tmp_path):
    printed = run("demo.py", "--smoke", "--output", str(tmp_path))
    content = json.loads((tmp_path / "demo.json").read_text())
    assert content["backend"] == BACKEND
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    contenders = {(row["name"], row["network"]) for row in content["results"]}
    assert contenders == {
        ("LoRA", "mean"),
        ("LoRA Dropout", "mean"),
        ("LoRA Dropout", "ensemble"),
        ("LoRA Dropout, per example", "mean"),
        ("LoRA Dropout, per example", "ensemble"),
        ("AdaLoRA", "mean"),
        ("AdaLoRA Dropout, per example", "mean"),
        ("AdaLoRA Dropout, per example", "ensemble"),
    }
    assert (tmp_path / "demo-ranks.png").read_bytes().startswith(b"\x89PNG")
    for row in content["results"]:
        assert 0 <= row["accuracy"] <= 1
        # Eight classes, hardly trained: near the logarithm of eight.
        assert 1.5 < row["nll"] < 3.0
        # 6 layers of 4 square and 2 feed-forward kernels, and the head.
        assert row["ranks"] == 6 * 8 * 6
        head = 384 * 8 + 8
        if row["name"].startswith("Ada"):
            # Ranks are spread as the training finds; a triplet has at least
            # 384 + 1 + 384 weights.
            assert row["weights"] - head >= row["ranks"] * (384 + 1 + 384)
        else:
            adapters = 6 * 8 * (4 * (384 + 384) + 2 * (384 + 1536))
            assert row["weights"] == adapters + head
        assert f"{row['weights']:,}" in printed


def test_mask_variance(tmp_path):
    path = tmp_path / "mask_variance.json"
    arguments = ("benchmarks/mask_variance.py", "--smoke", "--output")
    printed = run(*arguments, str(path))
    content = json.loads(path.read_text())
    assert set(content["cells"]) == {
        "gradient/bernoulli/batch/2",
        "gradient/balanced/batch/2",
        "ensemble/bernoulli/batch/2",
        "ensemble/balanced/batch/2",
    }
    for name, cell in content["cells"].items():
        assert cell["variance"] > 2 * cell["standard_error"] > 0, name
    assert "| gradient | batch | 2 | " in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_page_on_mask_variances_shows_its_file(closed_figures):
    """With N = 1 and both kinds of sharing, which the smoke run leaves out."""
    folder = ROOT / "docs/benchmarks"
    content = json.loads((folder / "mask_variance.json").read_text())
    report = runpy.run_path(
        str(ROOT / "examples/benchmarks/mask_variance_report.py")
    )
    table = report["table"](content)
    assert table.count("\n") == 2 + 3 * 4 - 1
    assert table in (ROOT / "docs/mask_variance.md").read_text()
    gradients, ensembles = report["plot"](content).axes
    assert len(gradients.containers) == 4
    assert len(ensembles.containers) == 2
