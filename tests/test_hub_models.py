"""KerasHub's tasks: adapt, train, average, merge, save, generate."""

import os

import hub_models
import keras
import numpy as np
import pytest
from helpers import BACKEND
from hub_models import models
from keras import ops

import keras_lora_dropout as kld
from keras_lora_dropout.core.instances import LayoutError

# Their routers and experts see all tokens of a batch in one row of them, Swin's
# and SAM's attention one window after another; HGNetV2's head normalizes over
# the batch; Stable Diffusion 3 has two prompts for each row; and SAM 3's boxes
# say by number which row they belong to.
IN_SEQUENCE = (
    *("GptOss", "Mixtral", "QwenMoe", "Qwen3Moe", "Qwen3_5Moe"),
    *("SwinTransformer", "HGNetV2", "StableDiffusion3", "SAM"),
)
# Blocks that read these kernels, and never call the layers.
UNCALLED = {"Gemma4": ("ffw_gating", "ffw_gating_2", "ffw_linear")}
TASKS = hub_models.tried_tasks()
# Compilation takes its time: `make test-all` has all of them on JAX, too.
FEW = (
    "AlbertTextClassifier",
    "BloomCausalLM",
    "Gemma4CausalLM",
    "MixtralCausalLM",
    "MobileNetImageClassifier",
    "QwenMoeCausalLM",
    "SmolLM3CausalLM",
    "T5GemmaSeq2SeqLM",
)
if BACKEND != "torch" and not os.environ.get("ALL_MODELS"):
    TASKS = [name for name in TASKS if name in FEW]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed"),
    # KerasHub's own: RWKV7, RoFormer V2, T5.
    pytest.mark.filterwarnings("ignore:.*'rwkv_ops' package is not installed"),
    pytest.mark.filterwarnings(r"ignore:(?s)(.*Using a non-tuple sequence)"),
    pytest.mark.filterwarnings("ignore:.*looks like it has unbuilt state"),
    pytest.mark.filterwarnings("ignore:.*does not support masking"),
    # D-FINE's and Gemma 3n's on JAX.
    pytest.mark.filterwarnings("ignore:(?s).*requested dtype int64"),
]


def runs_in_sequence(name):
    return name.startswith(IN_SEQUENCE)


def sampling_of(name):
    return "sequential" if runs_in_sequence(name) else "parallel"


def require_libraries(name):
    if name.startswith("SAM3") and BACKEND == "torch":
        why = "KerasHub's SAM 3 calls it on PyTorch"
        pytest.importorskip("torchvision", reason=why)


def adapted(name, optimizer=None, **options):
    options = {
        "sampling": sampling_of(name),
        "target_layers": hub_models.target_of(name),
        **options,
    }
    model = hub_models.build(name)
    kld.enable_lora_dropout(model, rank=2, num_samples=2, seed=0, **options)
    # KerasHub's own metrics take labels.
    nothing = {"metrics": [], "weighted_metrics": []}
    if isinstance(model, models.ObjectDetector):
        nothing = {"metrics": None}
    # Each tiny model runs once or twice: not worth compiling.
    optimizer = optimizer or keras.optimizers.Adam(0.01)
    loss = "mse"
    if name == "PARSeqCausalLM":
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, run_eagerly=True, **nothing)
    return model


def arrays(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def assert_same(actual, expected, tolerance=1e-4):
    for a, b in zip(
        keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True
    ):
        limit = tolerance * max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=limit)


def outputs_of(model, x):
    """What the model itself puts out; `predict` of some tasks decodes it."""
    inputs = keras.tree.map_structure(ops.convert_to_tensor, x)
    return to_numpy(model(inputs, training=False))


def to_numpy(outputs):
    return keras.tree.map_structure(ops.convert_to_numpy, outputs)


def train(name, model, x, steps):
    """Train by steps on the same batch."""
    y, weights = hub_models.labels_of(model, outputs_of(model, x))
    if name.startswith(hub_models.REFUSE_FIT):
        with pytest.raises(NotImplementedError, match=r"fit|Training"):
            model.fit(x, y)
        for _ in range(steps):
            keras.Model.train_on_batch(model, x, y, weights)
        return
    options = {"batch_size": hub_models.ROWS, "epochs": steps, "verbose": 0}
    model.fit(x, y, sample_weight=weights, **options)


@pytest.fixture(scope="module", params=TASKS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def trained(name):
    """A task after one step, what it was fed, and what the step left alone."""
    require_libraries(name)
    model = adapted(name)
    x = hub_models.inputs_of(model)
    before = model.predict(x, verbose=0)
    plain = hub_models.build(name)
    # On JAX, Stable Diffusion 3 cannot be compiled: it reads numbers of steps.
    plain.run_eagerly = name.startswith("StableDiffusion3")
    assert_same(before, plain.predict(x, verbose=0))
    frozen = [
        w
        for w in model.backbone.weights
        if not w.trainable and "seed" not in w.name
    ]
    frozen = list(zip(frozen, arrays(frozen), strict=True))
    factors = {path: arrays(lyr.factors) for path, lyr in model.adapted_layers}
    train(name, model, x, steps=2)
    return model, x, frozen, factors


def test_all_kernels_of_the_blocks_are_adapted(name):
    model = hub_models.build(name)
    target = hub_models.target_of(name)
    linear = keras.layers.Dense, keras.layers.EinsumDense
    if target == "all-convolutions":
        expected = [
            layer
            for part in model.backbone.layers
            for layer in part._flatten_layers()
            if type(layer).__name__ in ("Conv2D", "DepthwiseConv2D")
        ]
        kld.enable_lora_dropout(model, rank=1, target_layers=target)
        found = {id(layer) for _, layer in model.adapted_layers}
        assert found == {id(layer) for layer in expected} and found
        return
    left_out = next((v for k, v in UNCALLED.items() if name.startswith(k)), ())
    expected = [
        layer
        for part in model.backbone.layers
        if "embedding" not in part.name and not isinstance(part, linear)
        for layer in part._flatten_layers()
        if isinstance(layer, linear)
        and getattr(layer, "units", 0) != 1
        and layer.name not in (*left_out, "lm_head")
    ]
    kld.enable_lora_dropout(model, rank=1)
    found = [layer for _, layer in model.adapted_layers]
    assert {id(layer) for layer in found} == {id(layer) for layer in expected}
    assert len(found) >= 4


def test_every_task_is_tried_or_has_a_reason():
    tasks = hub_models.every_task()
    assert set(hub_models.NOT_TRIED) <= set(tasks)
    unknown = [
        name
        for name in hub_models.tried_tasks()
        if tasks[name].backbone_cls.__name__
        not in {**hub_models.TINY, **hub_models.TINY_CONVOLUTIONS}
        and name not in hub_models.COMPOSITES
    ]
    assert not unknown, "Add a tiny configuration, or a reason why not."


def test_layers_that_their_block_goes_past_are_refused():
    model = hub_models.build("Gemma4CausalLM")
    with pytest.raises(ValueError, match=r"ffw_linear.*never calls the layer"):
        kld.enable_lora_dropout(model, target_layers=["ffw_linear"], rank=2)


def test_training_reaches_all_adapters_and_nothing_frozen(trained):
    model, _, frozen, factors = trained
    for variable, value in frozen:
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
    for path, layer in model.adapted_layers:
        # Gradients of A may be too small for its values to show.
        _, b = arrays(layer.factors)
        assert np.isfinite(b).all() and (b != factors[path][1]).any(), path


def test_ensemble_is_the_mean_of_instances_that_differ(name, trained):
    model, x, _, _ = trained
    options = {"num_samples": 2, "seed": 1, "verbose": 0}
    samples = model.ensemble_predict(x, return_samples=True, **options)
    mean = model.ensemble_predict(x, **options)
    decode = hub_models.decoding_of(model)
    if decode is None:
        expected = keras.tree.map_structure(lambda s: s.mean(0), samples)
        assert_same(mean, expected)
    else:
        inputs = keras.tree.map_structure(ops.convert_to_tensor, x)
        outputs = model.as_ensemble(num_samples=2, seed=1)(inputs)
        assert_same(mean, to_numpy(decode(outputs, inputs)))
        options["num_samples"] = 1
        outputs = model.as_ensemble(num_samples=1, seed=1)(inputs)
        sample = model.ensemble_predict(x, return_samples=True, **options)
        expected = to_numpy(decode(outputs, inputs))
        assert_same(keras.tree.map_structure(lambda s: s[0], sample), expected)
    if name.startswith("StableDiffusion3"):
        del samples["latents"]  # Encoded images, which lie before all adapters.
    differ = [
        np.abs(sample[0] - sample[1]).max() > 1e-6
        for sample in keras.tree.flatten(samples)
    ]
    # Of decoded boxes, the number may be the same.
    assert all(differ) if decode is None else any(differ)


def test_parallel_instances_are_those_in_sequence(name):
    require_libraries(name)
    first, second = (
        # Not Adam, which makes whole steps of what is rounding alone.
        adapted(name, keras.optimizers.SGD(0.5), sampling=sampling)
        for sampling in ("sequential", "parallel")
    )
    x = hub_models.inputs_of(first)
    train(name, first, x, steps=1)
    if runs_in_sequence(name):
        with pytest.raises(LayoutError, match="sequential"):
            train(name, second, x, steps=1)
        return
    train(name, second, x, steps=1)
    for (_, a), (_, b) in zip(
        first.adapted_layers, second.adapted_layers, strict=True
    ):
        assert_same(arrays(a.factors), arrays(b.factors), 2e-4)


def test_adapters_survive_files_and_merging(name, trained, tmp_path):
    model, x, _, _ = trained
    expected = model.predict(x, verbose=0)
    model.save_adapters(tmp_path / "adapters")
    loaded = adapted(name)
    loaded.load_adapters(tmp_path / "adapters")
    assert_same(loaded.predict(x, verbose=0), expected)
    loaded.merge_adapters()
    assert_same(loaded.predict(x, verbose=0), expected)
    assert type(loaded) is getattr(models, name)


def test_ensembles_generate(name, trained):
    model, x, _, _ = trained
    if not isinstance(model, models.CausalLM):
        return
    side = "decoder_" if isinstance(model, models.Seq2SeqLM) else ""
    tokens, mask = f"{side}token_ids", f"{side}padding_mask"
    prompt = {key: value.copy() for key, value in x.items()}
    if mask in prompt:
        prompt[mask][:, 4:] = 0
    options = {"stop_token_ids": None, "seed": 0}
    if isinstance(model, models.RWKV7CausalLM):
        # Its `generate` needs its preprocessor.
        with pytest.raises(KeyError, match="predict_token_ids"):
            model.ensemble_generate(prompt, **options)
        return
    text = model.ensemble_generate(prompt, **options)
    found = ops.convert_to_numpy(text[tokens])
    np.testing.assert_array_equal(found[:, :4], x[tokens][:, :4])
    assert found.shape == x[tokens].shape
