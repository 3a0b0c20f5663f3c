"""Plain models out of adapted ones, and back."""

import families
import keras
import numpy as np
import pytest
import saved_models
from families import FAMILIES
from helpers import adapted_mlp
from helpers import array
from helpers import assert_close
from helpers import classification_data
from helpers import randomize
from helpers import set_biases
from helpers import set_random
from saved_models import KINDS
from saved_models import compiled
from saved_models import train

import keras_lora_dropout as kld
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def trained(kind):
    keras.utils.set_random_seed(1)
    model = compiled(KINDS[kind]())
    train(model)
    for _, layer in model.adapted_layers:
        set_random([f for f in layer.factors if f.shape[0]])
    return model


def attributes(layer):
    return {name for name in vars(layer) if not name.startswith("_torch")}


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("by")])
def test_a_merged_model_bears_no_trace(kind):
    model = trained(kind)
    make = {
        "sequential": saved_models.sequential,
        "subclassed": saved_models.subclassed,
    }.get(kind, saved_models.functional)
    fresh = compiled(make())
    train(fresh)
    x, _ = saved_models.data()
    before = model.predict(x, verbose=0)
    merged = model.merge_adapters()
    assert merged is model
    assert type(merged) is type(fresh)
    assert_close(merged.predict(x, verbose=0), before, 1e-6)
    fresh.predict(x, verbose=0)
    assert attributes(merged) <= attributes(fresh)
    layers = zip(flat(merged), flat(fresh), strict=True)
    for ours, theirs in layers:
        assert type(ours) is type(theirs)
        assert attributes(ours) - attributes(theirs) == set()
        assert len(ours.variables) == len(theirs.variables)
    assert [v.trainable for v in merged.weights] == [
        v.trainable for v in fresh.weights
    ]
    train(compiled(merged))
    merged.get_config()


def flat(model):
    return list(model._flatten_layers(include_self=False))


@pytest.mark.parametrize("kind", ["by_hand", "by_hand_functional"])
def test_models_built_by_hand(kind):
    model = trained(kind)
    x, _ = saved_models.data()
    before = model.predict(x, verbose=0)
    merged = model.merge_adapters()
    assert not any(isinstance(lyr, LoRADropoutAdapter) for lyr in flat(merged))
    assert_close(merged.predict(x, verbose=0), before, 1e-6)
    if kind == "by_hand_functional":
        assert type(merged) is type(saved_models.functional())


@pytest.mark.parametrize("rescale", [False, True])
def test_the_kernel_is_that_of_the_mean_network(rescale):
    model = adapted_mlp(dropout_rate=0.25, rescale=rescale, alpha=3.0)
    layer = model.get_layer("second")
    kernel, a, b = map(array, (layer._kernel, *layer.factors))
    scale = 3.0 / 2 * (1.0 if rescale else 0.75**2)
    model.merge_adapters()
    assert_close(layer.kernel, kernel + scale * a @ b, 1e-6)


def test_adalora_kernels():
    model = trained("adalora")
    layer = model.adapted_layers[0][1]
    kernel, a, lam, b = map(array, (layer._kernel, *layer.factors))
    model.merge_adapters()
    expected = kernel + layer_scale(3, 3) * a @ np.diag(lam) @ b
    assert_close(layer.kernel, expected, 1e-6)


def layer_scale(alpha, rank, rate=0.5):
    return alpha / rank * (1 - rate) ** 2


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda f: f[0].__name__)
def task(request):
    family = request.param[0]
    plain = family()
    model = kld.enable_lora_dropout(plain, rank=2, num_samples=3, seed=0)
    return randomize(model, scale=0.5), families.data_of(family)[0]


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_tasks(task):
    """Real components: instances, mean network, and the way back."""
    model, x = task
    adapted_class = type(model)
    kernels = [array(lyr._kernel) for _, lyr in model.adapted_layers]
    mean = model.predict(x, verbose=0)
    ensemble = model.ensemble_predict(x, seed=5, verbose=0)
    samples = model.ensemble_predict(x, seed=5, return_samples=True, verbose=0)
    instances = list(model.merge_instances(seed=5))
    assert len(instances) == 3
    for instance, sample in zip(instances, samples, strict=True):
        assert type(instance) is model.plain_class()
        assert_close(instance.predict(x, verbose=0), sample, 1e-5)
    each = [instance.predict(x, verbose=0) for instance in instances]
    assert_close(np.mean(each, axis=0), ensemble, 1e-5)
    merged = model.merge_adapters()
    assert type(merged) is type(instances[0])
    assert not any(isinstance(lyr, LoRADropoutAdapter) for lyr in flat(merged))
    assert_close(merged.predict(x, verbose=0), mean, 1e-5)
    merged.get_config()
    merged.backbone.get_config()
    restored = kld.unmerge_adapters(merged)
    assert restored is model and type(restored) is adapted_class
    for (_, layer), kernel in zip(model.adapted_layers, kernels, strict=True):
        np.testing.assert_array_equal(array(layer._kernel), kernel)
    np.testing.assert_array_equal(model.predict(x, verbose=0), mean)
    np.testing.assert_array_equal(
        model.ensemble_predict(x, seed=5, verbose=0), ensemble
    )


@pytest.mark.parametrize("kind", KINDS)
def test_unmerged_models_train_on(kind):
    """Masks, ranks and random states are those of before."""
    results = []
    for merged in (False, True):
        model = trained(kind)
        model.add_adapter("other", rank=1)
        if merged:
            kld.unmerge_adapters(model.merge_adapters())
            assert model.adapter_names == ["default", "other"]
        else:
            model._restart_optimizer()
        keras.utils.set_random_seed(2)  # For dropout on torch.
        train(model)
        results.append([array(w) for w in model.weights])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_unmerge_needs_what_merge_kept():
    model = adapted_mlp()
    with pytest.raises(ValueError, match="keep_kernels=True"):
        kld.unmerge_adapters(model)
    model.merge_adapters(keep_kernels=False)
    with pytest.raises(ValueError, match="keep_kernels=True"):
        kld.unmerge_adapters(model)


def test_disabled_adapters():
    model = adapted_mlp()
    set_biases(model)
    x, y = classification_data()
    plain_weights = [array(w) for w in model.weights if "lora" not in w.path]
    base = saved_plain(plain_weights).predict(x, verbose=0)
    enabled = model.predict(x, verbose=0), model.evaluate(x, y, verbose=0)
    ensemble = model.ensemble_predict(x, seed=1, verbose=0)
    for _ in range(2):
        with model.disable_adapters():
            assert_close(model.predict(x, verbose=0), base, 1e-6)
            assert_close(model(x), base, 1e-6)
            assert_close(
                model.ensemble_predict(x, seed=1, verbose=0), base, 1e-6
            )
            assert model.evaluate(x, y, verbose=0) != enabled[1]
            with model.disable_adapters():
                assert_close(model.predict(x, verbose=0), base, 1e-6)
            for call in (model.fit, model.train_on_batch):
                with pytest.raises(ValueError, match="disable_adapters"):
                    call(x, y)
        np.testing.assert_array_equal(model.predict(x, verbose=0), enabled[0])
        assert model.evaluate(x, y, verbose=0) == enabled[1]
        np.testing.assert_array_equal(
            model.ensemble_predict(x, seed=1, verbose=0), ensemble
        )
    with pytest.raises(KeyError), model.disable_adapters():
        raise KeyError
    np.testing.assert_array_equal(model.predict(x, verbose=0), enabled[0])


def saved_plain(weights):
    from helpers import tiny_mlp

    plain = tiny_mlp()
    plain.set_weights(weights)
    return plain


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_generated_text_follows():
    """KerasHub keeps a compiled function of its own for `generate`."""
    model = families.llama()
    model.compile(sampler="greedy")
    text, length = "the", 24
    base = model.generate(text, length)
    kld.enable_lora_dropout(model, rank=2, seed=0)
    assert model.generate(text, length) == base
    randomize(model, scale=3.0)
    adapted = model.generate(text, length)
    assert adapted != base
    with model.disable_adapters():
        assert model.generate(text, length) == base
    assert model.generate(text, length) == adapted
    assert model.merge_adapters().generate(text, length) == adapted


def test_mixed_precision_and_low_precision():
    x, _ = classification_data()
    for policy, tolerance in (("mixed_bfloat16", 0.05), ("bfloat16", 0.2)):
        keras.config.set_dtype_policy(policy)
        try:
            model = adapted_mlp()
        finally:
            keras.config.set_dtype_policy("float32")
        before = model.predict(x, verbose=0).astype("float32")
        kernel = array(model.get_layer("first")._kernel)
        model.merge_adapters()
        after = model.predict(x, verbose=0).astype("float32")
        assert_close(after, before, tolerance)
        kld.unmerge_adapters(model)
        restored = array(model.get_layer("first")._kernel)
        np.testing.assert_array_equal(restored, kernel)


def test_bad_arguments_are_refused_at_once():
    model = adapted_mlp()
    for bad in (0, -1, 2.5):
        with pytest.raises(ValueError, match="num_samples"):
            model.merge_instances(bad)
    with pytest.raises(TypeError, match="seed"):
        model.merge_instances(2, seed="x")
    with pytest.raises(TypeError, match="keep_kernels"):
        model.merge_adapters(keep_kernels="yes")


def test_instances_by_the_papers_equation():
    """[L] Eq. 2: rows of A and columns of B are masked, nothing rescaled."""
    model = adapted_mlp(num_samples=2)
    draws = model._instances(2, 3)
    layer = model.get_layer("first")
    mask_a, mask_b = draws.masks_of(layer)
    kernel, a, b = map(array, (layer._kernel, *layer.factors))
    for n, instance in enumerate(model.merge_instances(2, seed=3)):
        delta = (mask_a[n][:, None] * a) @ (b * mask_b[n])
        assert_close(instance.get_layer("first").kernel, kernel + delta, 1e-6)
    assert 0 < mask_a.mean() < 1
