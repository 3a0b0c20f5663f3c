"""Eight devices compute what one does, and send nothing but gradients.

The runs are those of `many_devices.py`, in processes with as many devices.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import keras
import many_devices
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "jax",
    reason="`keras.distribution` runs on JAX alone.",
)

PROGRAM = pathlib.Path(many_devices.__file__)
CLOSE = {"rtol": 0, "atol": 1e-5}


def start(devices, *arguments, program=PROGRAM):
    flag = f" --xla_force_host_platform_device_count={devices}"
    flags = os.environ.get("XLA_FLAGS", "") + flag
    return subprocess.Popen(
        [sys.executable, str(program), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=1500)
    assert process.returncode == 0, output


def load(path):
    """Return `{(run, where): {name: array}}`."""
    found = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays:
            run, where, name = key.split("|")
            found.setdefault((run, where), {})[name] = arrays[key]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    finish(start(8, folder))
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return load(folder / "results.npz")


@pytest.fixture(scope="module")
def facts(folder):
    return json.loads((folder / "facts.json").read_text())


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, err_msg=name, **CLOSE)


def assert_trained(run):
    """Against comparing what never moves."""
    assert len(run["losses"]) == many_devices.STEPS
    assert np.ptp(run["losses"]) > 1e-3


@pytest.mark.parametrize("title", many_devices.SAMPLINGS)
def test_data_parallel_training_is_that_of_one_device(results, title):
    assert_trained(results[title, "one"])
    assert_same(results[title, "data"], results[title, "one"])


@pytest.mark.parametrize("title", ["deberta", "hidden-key"])
def test_real_encoders(results, title):
    assert_trained(results[title, "one"])
    assert_same(results[title, "data"], results[title, "one"])


@pytest.mark.parametrize("title", many_devices.LLAMAS)
@pytest.mark.parametrize("where", ["data", "model"])
def test_real_decoders(results, title, where):
    assert_trained(results[title, "one"])
    assert_same(results[title, where], results[title, "one"])


def test_runs_differ_from_each_other(results):
    ends = [results[t, "one"]["losses"][-1] for t in many_devices.SAMPLINGS]
    assert len(set(np.round(ends, 5))) > len(ends) / 2


def test_ensembles_are_those_of_one_device(results):
    one = results["ensembles", "one"]
    assert_same(results["ensembles", "data"], one)
    assert np.abs(one["samples"] - one["mean"]).max() > 1e-3
    assert np.abs(one["drops"] - one["ensemble"]).max() > 1e-4


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_a_run_goes_on_on_another_number_of_devices(results, devices):
    whole = results["4-batch-parallel-adalora", "one"]
    rest = results["resumed", f"{devices} devices"]
    outputs = rest.pop("adapters")
    expected = results["resumed", "8 devices"].get("adapters", outputs)
    np.testing.assert_allclose(outputs, expected, **CLOSE)
    state = {name: value for name, value in whole.items() if ":" in name}
    assert_same({name: rest[name] for name in state}, state)


def test_steps_send_gradients_of_what_trains_alone(facts):
    """And the scalars of loss and accuracy."""
    for title, step in facts["sent"].items():
        kinds = {kind for kind, _ in step["sent"]}
        assert kinds == {"all-reduce"}, title
        sent = sum(size for _, size in step["sent"])
        # DeBERTa's query and key are called twice, and reduced twice.
        gradients = step["trained"] + step["called_twice"] - step["derived"]
        assert sent - gradients in (8, 12), title


def test_what_is_sent_is_counted():
    text = """
  %a = f32[8]{0} all-reduce(f32[8]{0} %b), replica_groups={}
  %c = (f32[2,3]{1,0}, bf16[4]{0}) all-to-all(%d, %e)
  %f = s32[] collective-permute-start(%g)
  %h = f32[5]{0} add(%i, %j)
    """
    assert many_devices.collectives(text) == [
        ("all-reduce", 32),
        ("all-to-all", 32),
        ("collective-permute", 4),
    ]


def test_adapters_are_split_as_their_kernels_are(facts):
    seen = set()
    for path, specs in facts["layouts"].items():
        rows, columns = {
            "attention_output": ("model", "batch"),
            "feedforward_gate_dense": ("batch", "model"),
            "feedforward_intermediate_dense": ("batch", "model"),
            "feedforward_output_dense": ("model", "batch"),
        }.get(path.split("/")[-1], ("model", "batch"))
        for name in ("lora_kernel_a", "initial_kernel_a", "momentum_a"):
            assert specs[name] == [rows, None], (path, name)
        for name in ("lora_kernel_b", "initial_kernel_b"):
            assert specs[name] == [None, columns], (path, name)
        seen.add(tuple(specs["kernel"]))
    assert ("model", None, "batch") in seen, "two input axes in one"
    assert ("model", "batch", None) in seen, "two output axes in one"


def test_two_processes_with_four_devices_each(folder, results):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(4, folder, port, process) for process in range(2)]
    for process in processes:
        finish(process)
    for process in range(2):
        for (title, _), run in load(folder / f"process-{process}.npz").items():
            assert_same(run, results[title, "one"])
    loaded = many_devices.build("llama")
    loaded.load_adapters(folder / "shared")
    whole = results["llama-lora", "one"]
    factors = [name for name in whole if ":lora_kernel" in name]
    state = many_devices.state_of(loaded)
    found = [name for name in factors if name in state]
    assert len(found) == 2 * len(loaded.adapted_layers)
    assert (folder / "adapters-0").exists(), "the first process writes"
    assert not (folder / "adapters-1").exists(), "and no other"
    for name in found:
        np.testing.assert_allclose(state[name], whole[name], **CLOSE)


def test_the_table_of_scale(tmp_path):
    program = PROGRAM.parents[1] / "examples" / "benchmarks" / "scale.py"
    options = "--smoke", "--model-axis", 2, "--devices", 2, 8
    finish(start(8, *options, "--output", tmp_path, program=program))
    found = json.loads((tmp_path / "scale.json").read_text())
    found = found["cases"]["smoke"]["found"]
    # Of 16 features, rank 2, two blocks: in float32, and the loss.
    adapters = 2 * 4 * 2 * (16 * 2) * 4 + 4
    for devices in ("2", "8"):
        cell = dict(found["data"][devices])
        assert cell.pop("held") > adapters
        assert cell == {"all-reduce": adapters}
    # Two heads cannot be split over a batch axis of four.
    assert "partitioned 4 times" in found["kerashub"]["8"]
    assert found["model"]["8"]["all-reduce"] > adapters / 2
    page = (tmp_path / "scale.md").read_text()
    assert page.count("\n| ") == 7


def test_the_page_on_scale_says_what_was_counted():
    docs = PROGRAM.parents[1] / "docs"
    cases = json.loads((docs / "benchmarks" / "scale.json").read_text())
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (docs / "scale.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    layouts = {
        "data parallel": "data",
        "model parallel": "model",
        "KerasHub's layout map": "kerashub",
    }
    shown, model = [], None
    for title, _, layout, devices, sent, held in rows[1:]:
        model = title or model
        for count in devices.split(", "):
            shown.append((model, layouts[layout], count))
            found = cases["cases"][model]["found"][layouts[layout]][count]
            if isinstance(found, str):
                assert (sent, held) == ("not possible", "")
                continue
            assert held == f"{found.pop('held') / 1e9:.3g}"
            assert sent == f"{sum(found.values()) / 1e9:.3g}"
    assert shown == [
        (model, layout, count)
        for model, case in cases["cases"].items()
        for layout in case["found"]
        for count in ("8", "64", "512")
    ]


def test_models_built_elsewhere_are_refused(facts):
    before, after = facts["refused"]
    assert "before the distribution was set" in before
    assert "no longer in force" in after
