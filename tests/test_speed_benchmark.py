"""The benchmark of speed and memory, in its smallest form, for real."""

import importlib
import json
import pathlib
import platform
import signal
import subprocess
import sys
import time
import types

import pytest
from helpers import BACKEND

FOLDER = pathlib.Path(__file__).parents[1] / "examples" / "benchmarks"
BACKENDS = "torch,peft" if BACKEND == "torch" else BACKEND
MODULES = ["arguments", "children"]
ACTIONS = ["train", "predict", "four_predicts", "ensemble_predict"]


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, str(FOLDER / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script, *arguments, code=0):
    process = start(script, *arguments)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == code, printed + errors
    return printed + errors


def smoke(folder, *arguments):
    arguments = ("--smoke", "--device", "cpu", "--output", folder, *arguments)
    return run("speed.py", *arguments), read(folder)


def read(folder):
    (path,) = folder.glob("speed_*_smoke_cpu*.json")
    return json.loads(path.read_text())


def rows_of(content, contender):
    return {
        row["action"]: row
        for row in content["results"]
        if row["contender"] == contender
    }


def test_all_is_measured_and_reported(tmp_path):
    printed, content = smoke(
        tmp_path,
        *("--backends", BACKENDS, "--contenders", "kerashub,n4,peft-lora"),
    )
    assert content["finished"]
    for row in content["results"]:
        assert row["failed"] is None
        assert len(row["ms"]) == 3 and min(row["ms"]) > 0
        if sys.platform == "linux":
            memory = row["memory"]
            assert 0 < memory["excess"] < memory["peak"]
            assert not memory["since_start"]
    assert list(rows_of(content, "n4")) == ACTIONS
    assert list(rows_of(content, "kerashub")) == ["train", "predict"]
    assert all(content["versions"].values())
    ours, theirs = "LoRA Dropout, N = 4, parallel", "KerasHub `enable_lora`"
    assert ours in printed and theirs in printed
    if BACKEND == "torch":
        assert "PEFT LoRA" in printed
        weights = {
            about["contender"]: about["trainable_weights"]
            for about in content["contenders"]
        }
        assert weights["peft-lora"] == weights["n4"]

    report = tmp_path / "report"
    run("speed_report.py", "--input", tmp_path, "--output", report)
    page = (report / "speed.md").read_text()
    assert ours in page and theirs in page
    assert "`ensemble_predict` of 4 / four `predict`" in page
    plot = report / "speed_deberta_smoke_cpu.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.name in page
    assert read(report) == content


def test_a_contender_that_fails_is_reported(tmp_path):
    # KerasHub takes a rank above the kernel's smaller side; ours does not.
    printed, content = smoke(
        tmp_path,
        *("--backends", BACKEND, "--contenders", "kerashub,n1"),
        *("--model", "llama", "--rank", "17"),
        *("--one-at-a-time", "--rounds", "2", "--keep-memory"),
    )
    assert content["finished"] and content["keeps_memory"]
    for row in rows_of(content, "n1").values():
        assert "ValueError" in row["failed"] and "rank" in row["failed"]
        assert row["ms"] == []
    for row in rows_of(content, "kerashub").values():
        assert row["failed"] is None and len(row["ms"]) == 3
    assert "no training step, `predict`: ValueError" in printed
    run("speed_report.py", "--input", tmp_path)
    page = (tmp_path / "speed.md").read_text()
    assert "## Llama, smoke, CPU, memory kept" in page


def test_a_killed_run_leaves_what_was_finished(tmp_path):
    process = start(
        "speed.py",
        *("--smoke", "--device", "cpu", "--output", tmp_path),
        *("--model", "bert", "--backends", BACKEND, "--contenders", "n4"),
        *("--repeats", "20"),
    )
    try:
        wait_for_predictions(process, tmp_path)
        children = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    content = read(tmp_path)
    assert not content["finished"]
    rows = rows_of(content, "n4")
    assert len(rows["train"]["ms"]) == 20
    assert len(rows["ensemble_predict"]["ms"]) < 20
    run("speed_report.py", "--input", tmp_path)
    page = (tmp_path / "speed.md").read_text()
    assert "The run was interrupted." in page
    wait_for_end_of(children)


def wait_for_predictions(process, folder):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if list(folder.glob("speed_*.json")):
            rows = rows_of(read(folder), "n4")
            if rows["predict"]["ms"]:
                return
        time.sleep(0.02)
    raise AssertionError("No prediction was measured.")


def children_of(parent):
    """Process ids of the children, where /proc tells."""
    found = []
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(status.parent.name))
    return found


def wait_for_end_of(processes):
    deadline = time.monotonic() + 30
    while any(map(is_alive, processes)):
        assert time.monotonic() < deadline, "A child outlived the benchmark."
        time.sleep(0.1)


def is_alive(process):
    try:
        status = pathlib.Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "bert", "--scale", "7b"], "bert has no scale 7b"),
        (["--length", "513"], "deberta takes at most 512 tokens"),
        (["--repeats", "0"], "'0' is no positive integer"),
        (["--contenders", "n1,n3"], "'n3' is none of kerashub, plain"),
        (
            ["--backends", "peft", "--contenders", "n1"],
            "does --actions train,predict,four_predicts,ensemble_predict on "
            "--backends peft",
        ),
        (
            ["--contenders", "n1", "--actions", "ensemble_predict"],
            "none of --contenders n1 does --actions ensemble_predict",
        ),
        (["--threads", "100000"], "--threads: there are"),
    ],
)
def test_bad_command_lines_are_refused(tmp_path, arguments, message):
    printed = run("speed.py", "--output", tmp_path, *arguments, code=2)
    assert message in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("library", "can"),
    [
        (("glibc", "2.35"), True),
        (("glibc", "3.0"), True),
        (("glibc", "2.9"), False),
        (("", ""), False),
    ],
)
def test_memory_is_kept_where_the_library_can(monkeypatch, library, can):
    monkeypatch.syspath_prepend(FOLDER)
    arguments, children = map(importlib.import_module, MODULES)
    monkeypatch.setattr(platform, "libc_ver", lambda: library)
    monkeypatch.setattr(sys, "argv", ["speed.py", "--keep-memory"])
    if not can:
        with pytest.raises(SystemExit):
            arguments.parse("")
        return
    options, _ = arguments.parse("")
    contender = types.SimpleNamespace(backend="jax")
    variables = children.environment(contender, options)
    assert "trim_threshold" in variables["GLIBC_TUNABLES"]


def test_a_report_of_nothing_is_refused(tmp_path):
    printed = run("speed_report.py", "--input", tmp_path, code=2)
    assert "run speed.py first" in printed


@pytest.mark.skipif(BACKEND != "torch", reason="counts what torch dispatches")
def test_matrix_products_are_those_of_peft(tmp_path):
    printed = run("counted_flops.py", "--smoke", "--output", tmp_path)
    assert "deberta: PEFT LoRA" in printed
    flops = json.loads((tmp_path / "counted_flops.json").read_text())["flops"]
    bert, deberta = flops["bert"], flops["deberta"]
    assert bert["n1"] == bert["plain"] == bert["n1-example"]
    assert bert["n1"] == bert["peft-lora"] < bert["kerashub"]
    assert bert["n4"] == 4 * bert["n1"]
    assert deberta["n1"] < deberta["peft-lora"] < deberta["kerashub"]
    table = (tmp_path / "counted_flops.md").read_text()
    assert "| PEFT LoRA | " in table
