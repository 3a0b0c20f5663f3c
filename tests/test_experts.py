"""Adapters on the kernels of experts, in KerasHub's mixtures."""

import hub_models
import keras
import numpy as np
import pytest
from helpers import array
from helpers import assert_close
from helpers import set_random
from keras import ops

import keras_lora_dropout as kld
from keras_lora_dropout.architectures import experts
from keras_lora_dropout.conversion.targets import layer_paths
from keras_lora_dropout.core.instances import LayoutError
from keras_lora_dropout.layers import quantized

MIXTURES = ["GptOss", "Mixtral", "Qwen3Moe", "Qwen3_5Moe", "QwenMoe"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed"),
    pytest.mark.filterwarnings(r"ignore:(?s)(.*Using a non-tuple sequence)"),
    pytest.mark.filterwarnings("ignore:.*looks like it has unbuilt state"),
]


@pytest.fixture(scope="module", params=MIXTURES)
def name(request):
    return f"{request.param}CausalLM"


def adapted(name, random=True, **options):
    model = hub_models.build(name)
    options = {"rank": 2, "num_samples": 2, "seed": 0, **options}
    options = {"sampling": "sequential", **options}
    target = r"experts$|/query$"
    kld.enable_lora_dropout(model, target_layers=target, **options)
    if random:
        for _, layer in model.adapted_layers:
            set_random(layer.factors, scale=0.3)
    nothing = {"metrics": [], "weighted_metrics": []}
    optimizer = keras.optimizers.SGD(0.5)
    model.compile(optimizer, "mse", run_eagerly=True, **nothing)
    return model


def banks(model):
    return [lyr for path, lyr in model.adapted_layers if "experts" in path]


def kernels_of(model):
    return [
        array(kernel)
        for bank in banks(model)
        for kernel in quantized.kernel_weights(bank)
    ]


def deltas(bank, mask_a=None, mask_b=None):
    """The delta of each kernel, expert by expert, in float64."""
    a, b = (array(factor) for factor in bank.factors)
    a = a if mask_a is None else a * mask_a[:, None]
    b = b if mask_b is None else b * mask_b
    row = column = 0
    found = []
    for kernel in quantized.kernel_weights(bank):
        experts, rows, columns = kernel.shape
        delta = np.zeros(kernel.shape)
        for n in range(experts):
            delta[n] = a[row : row + rows] @ b[:, column : column + columns]
            row, column = row + rows, column + columns
        found.append(bank.scaling * delta)
    assert (row, column) == (len(a), b.shape[1])
    return found


def test_a_fresh_adapter_changes_nothing(name):
    model, plain = adapted(name, random=False), hub_models.build(name)
    x = hub_models.inputs_of(model)
    expected = plain.predict(x, verbose=0)
    assert_close(model.predict(x, verbose=0), expected)
    assert len(banks(model)) == 2


def test_each_expert_has_factors_and_masks_of_its_own(name):
    model = adapted(name)
    x = hub_models.inputs_of(model)
    draws = model._instances(3, 5)
    samples = model.ensemble_predict(
        x, num_samples=3, seed=5, return_samples=True, verbose=0
    )
    assert np.abs(samples[0] - samples[1]).max() > 1e-4
    keep = {id(b): draws.masks_of(b) for b in banks(model)}
    references = list(model.merge_instances(num_samples=3, seed=5))
    for n, plain in enumerate(references):
        assert_close(plain.predict(x, verbose=0), samples[n], 1e-4)
        merged = [
            layer
            for path, layer in layer_paths(plain).items()
            if path.endswith("experts")
        ]
        for bank, target in zip(banks(model), merged, strict=True):
            mask_a, mask_b = keep[id(bank)]
            expected = deltas(bank, mask_a[n], mask_b[n])
            for kernel, other, delta in zip(
                quantized.kernel_weights(bank),
                quantized.kernel_weights(target),
                expected,
                strict=True,
            ):
                assert_close(array(other) - array(kernel), delta, 1e-5)


def test_all_factors_train_and_no_kernel(name):
    model = adapted(name)
    x = hub_models.inputs_of(model)
    kernels = [
        array(k) for b in banks(model) for k in quantized.kernel_weights(b)
    ]
    factors = [array(f) for b in banks(model) for f in b.factors]
    outputs = model.predict(x, verbose=0)
    model.fit(x, np.ones_like(outputs), batch_size=3, verbose=0)
    now = kernels_of(model)
    for start, end in zip(kernels, now, strict=True):
        np.testing.assert_array_equal(start, end)
    now = [array(f) for b in banks(model) for f in b.factors]
    for start, end in zip(factors, now, strict=True):
        assert np.abs(start - end).max() > 1e-7


def test_merging_and_files(name, tmp_path):
    model = adapted(name)
    x = hub_models.inputs_of(model)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(x, verbose=0), expected, 1e-5)
    model.save_adapters(tmp_path / "adapters")
    fresh = adapted(name, random=False)
    fresh.load_adapters(tmp_path / "adapters")
    assert_close(fresh.predict(x, verbose=0), expected, 1e-5)
    with model.disable_adapters():
        base = model.predict(x, verbose=0)
    plain = hub_models.build(name)
    assert_close(base, plain.predict(x, verbose=0), 1e-5)
    kernels = [
        array(k) for b in banks(model) for k in quantized.kernel_weights(b)
    ]
    mean = [
        (1 - b.dropout_rate) ** 2 * d for b in banks(model) for d in deltas(b)
    ]
    model.merge_adapters()
    assert_close(model.predict(x, verbose=0), expected, 1e-4)
    merged = [
        array(kernel)
        for path, layer in layer_paths(model).items()
        if path.endswith("experts")
        for kernel in quantized.kernel_weights(layer)
    ]
    for kernel, delta, total in zip(kernels, mean, merged, strict=True):
        assert_close(kernel + delta, total, 1e-5)
    kld.unmerge_adapters(model)
    assert_close(model.predict(x, verbose=0), expected, 1e-5)
    now = kernels_of(model)
    for start, end in zip(kernels, now, strict=True):
        np.testing.assert_array_equal(start, end)


def test_ensembles_generate():
    model = adapted("MixtralCausalLM")
    x = hub_models.inputs_of(model)
    prompt = {**x, "padding_mask": x["padding_mask"].copy()}
    prompt["padding_mask"][:, 4:] = 0
    text = model.ensemble_generate(prompt, stop_token_ids=None, seed=0)
    found = ops.convert_to_numpy(text["token_ids"])
    np.testing.assert_array_equal(found[:, :4], x["token_ids"][:, :4])


def test_what_does_not_go_is_said():
    model = adapted("MixtralCausalLM", sampling="parallel")
    x = hub_models.inputs_of(model)
    outputs = model.predict(x, verbose=0)
    with pytest.raises(LayoutError, match="sequential"):
        model.train_on_batch(x, np.ones_like(outputs))
    with pytest.raises(ValueError, match=r"experts.*at most 16"):
        kld.enable_lora_dropout(
            hub_models.build("MixtralCausalLM"),
            target_layers="experts$",
            rank=17,
        )
    with pytest.raises(ValueError, match=r"DoRA, which is for Dense"):
        adapted("MixtralCausalLM", use_dora=True)
    budget = kld.RankBudget(
        target_rank=1, warmup_steps=1, final_steps=1, mask_interval=1
    )
    with pytest.raises(ValueError, match=r"AdaLoRA, which is for"):
        adapted("MixtralCausalLM", rank_budget=budget)
    with pytest.raises(ValueError, match=r"'gaussian' is not made for"):
        adapted("MixtralCausalLM", init_lora_weights="gaussian")


def test_a_bank_that_computes_otherwise_is_left_alone(monkeypatch):
    known = {}
    monkeypatch.setattr(
        experts, "adapts_experts", lambda bank, *how: known.update({bank: how})
    )
    experts.register()
    assert len(known) == len(MIXTURES)
    changed = next(
        bank for bank in known if bank.__name__.startswith("Mixtral")
    )
    monkeypatch.setattr(changed, "call", lambda self, hidden_states: None)
    known.clear()
    experts.register()
    assert len(known) == len(MIXTURES) - 1 and changed not in known
