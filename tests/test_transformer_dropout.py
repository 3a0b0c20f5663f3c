"""Transformer dropout on whole models: training, ensembles, files, removal."""

import keras
import keras_hub
import numpy as np
import pytest
from dropping_models import SETTINGS
from dropping_models import adapted
from dropping_models import batch
from dropping_models import compiled
from dropping_models import small_transformer
from helpers import BACKEND
from helpers import array
from helpers import assert_close
from keras import ops

import keras_lora_dropout as kld
from keras_lora_dropout.conversion import recipe
from keras_lora_dropout.conversion import transformer_dropout
from keras_lora_dropout.core import masks
from keras_lora_dropout.core import structured_dropout as sd
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.mixed_classes import has_mixin
from keras_lora_dropout.training import objective

HIDDEN_KEY = kld.hidden_key(0.4, 0.3, kl_weight=0.5)


def dropping(settings=None, **options):
    model = adapted(**options)
    settings = SETTINGS if settings is None else settings
    return compiled(kld.enable_transformer_dropout(model, **settings))


def step(model, seed=0, **options):
    """Set all random states, take one step, return what it did."""
    model.mask_seed_generator.state.assign([seed, 0])
    before = [array(w) for w in model.trainable_variables]
    logs = model.train_on_batch(*batch(), return_dict=True, **options)
    after = [array(w) for w in model.trainable_variables]
    changes = [a - b for a, b in zip(before, after, strict=True)]
    return float(logs["loss"]), changes


def mixed(model):
    return [layer for layer in descendants(model) if has_mixin(layer)]


# Training


def test_a_step_drops_what_the_seed_says():
    model, (x, y) = dropping(), batch()
    loss, _ = step(model)
    model = dropping()  # The weights before.
    generator = keras.random.SeedGenerator(0)
    generator.state.assign([0, 0])
    generator.next()  # Masks of the factors.
    draws = masks.Draws(
        model.mask_plan, dropout=sd.DropoutDraws(generator.next())
    )
    with masks.use_draws(draws):
        logits = model(x, training=False)
    expected = keras.losses.sparse_categorical_crossentropy(
        y, logits, from_logits=True
    )
    assert_close(loss, ops.mean(expected))
    assert abs(loss - step(dropping({"hidden": kld.HiddenCut(0.0)}))[0]) > 0.01
    assert loss != step(dropping(), seed=1)[0]


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
@pytest.mark.parametrize("settings", [SETTINGS, HIDDEN_KEY])
def test_rates_of_zero_are_the_plain_step(settings, sampling):
    more = {"dropout_rate": 0.5, "num_samples": 3, "sampling": sampling}
    loss, changes = step(compiled(adapted(**more)))
    zero = {
        "attention": kld.DropKey(0.0),
        "hidden": kld.HiddenCut(0.0),
        "consistency": None,
    }
    other, same = step(dropping(zero, **more))
    assert_close(other, loss)
    for change, expected in zip(same, changes, strict=True):
        assert_close(change, expected)
    different, _ = step(dropping(settings, **more))
    assert abs(different - loss) > 1e-3


def test_instances_and_examples_drop_for_themselves():
    x = np.repeat(batch(1)[0], 6, axis=0)
    for sampling, passes in ("parallel", 1), ("sequential", 3):
        model = dropping(num_samples=3, sampling=sampling)
        drawn = objective.draw_passes(model, x)
        assert len({tuple(array(seed)) for _, seed in drawn}) == passes
        outputs = []
        for entry in drawn:
            draws = objective.pass_draws(model, x, entry)
            with masks.use_draws(draws):
                tiled = np.concatenate([x] * (3 // passes))
                outputs += list(array(model(tiled, training=True)))
        # The examples are all the same, and so are the masks of rate 0.
        assert len({np.round(row, 4).tobytes() for row in outputs}) == 18


def test_what_drops_before_the_first_adapter_is_not_shared():
    model = adapted(
        target_layers="second_attention",
        dropout_rate=0.5,
        num_samples=2,
        sampling="sequential",
    )
    consistency = kld.Consistency(1.0)
    kld.enable_transformer_dropout(
        model, attention=kld.DropKey(0.5), consistency=consistency, blocks=[0]
    )
    plan = model.mask_plan
    first = model.get_layer("first")
    assert not plan.touches(first)
    draws = masks.Draws(plan, dropout=sd.DropoutDraws(ops.zeros((2,), "int32")))
    with masks.use_draws(draws):
        assert plan.touches(first)
    assert np.isfinite(step(compiled(model))[0])


def test_prediction_drops_nothing():
    model, plain, (x, y) = dropping(), compiled(adapted()), batch()
    assert_close(model.predict(x, verbose=0), plain.predict(x, verbose=0))
    assert_close(
        model.evaluate(x, y, verbose=0), plain.evaluate(x, y, verbose=0)
    )
    assert_close(
        model.ensemble_predict(x, seed=0, verbose=0),
        plain.ensemble_predict(x, seed=0, verbose=0),
    )
    state = ops.copy(model.mask_seed_generator.state.value)
    assert np.abs(array(model(x, training=True) - plain(x))).max() > 1e-2
    model.mask_seed_generator.state.assign(state)


def test_checkpointed_layers_drop_the_same_again():
    def train(remat):
        if not remat:
            return step(dropping(HIDDEN_KEY, dropout_rate=0.5, num_samples=2))
        names = ["second_inner", "feedforward_output_dense"]
        if BACKEND != "tensorflow":  # Keras cannot checkpoint attention there.
            names.append("first_attention")
        scope = keras.RematScope(mode="list_of_layers", layer_names=names)
        with scope:
            model = dropping(HIDDEN_KEY, dropout_rate=0.5, num_samples=2)
            return step(model)

    (loss, changes), (again, same) = train(False), train(True)
    assert_close(again, loss)
    for change, expected in zip(same, changes, strict=True):
        assert_close(change, expected, 1e-4)


def test_it_trains_with_adalora():
    budget = kld.RankBudget(target_rank=1, warmup_steps=1, final_steps=1)
    model = dropping(HIDDEN_KEY, rank_budget=budget, rank=3, dropout_rate=0.3)
    compiled(model, optimizer=keras.optimizers.Adam(0.01))
    x, y = batch(8)
    history = model.fit(x, y, batch_size=4, epochs=3, verbose=0).history
    assert {"loss", "consistency_loss"} <= set(history)
    assert np.isfinite(history["loss"]).all()
    assert sum(model.rank_pattern().values()) == len(model.adapted_layers)


# Ensembles


@pytest.mark.parametrize("pattern", sd.PATTERNS)
def test_ensembles_can_include_it(pattern):
    x, y = batch(7)
    settings = {
        "attention": kld.DropAttention(0.4, pattern),
        "hidden": kld.HiddenCut(0.4, pattern),
    }
    results = {}
    for sampling in "parallel", "sequential":
        model = dropping(
            settings, dropout_rate=0.5, num_samples=3, sampling=sampling
        )

        def predict(model=model, **options):
            return model.ensemble_predict(
                x, verbose=0, include_transformer_dropout=True, **options
            )

        results[sampling] = predict(seed=1)
        assert_close(predict(seed=1, batch_size=3), results[sampling])
        assert np.abs(predict(seed=2) - results[sampling]).max() > 1e-3
        without = model.ensemble_predict(x, seed=1, verbose=0)
        assert np.abs(without - results[sampling]).max() > 1e-3
        samples = predict(seed=1, return_samples=True)
        assert_close(samples.mean(0), results[sampling])
        loss = model.ensemble_evaluate(
            x, y, seed=1, include_transformer_dropout=True, verbose=0
        )
        expected = keras.losses.sparse_categorical_crossentropy(
            y, results[sampling], from_logits=True
        )
        assert_close(loss, ops.mean(expected), 1e-4)
    assert_close(results["parallel"], results["sequential"])


def test_there_must_be_something_to_include():
    model = compiled(adapted())
    for method in model.ensemble_predict, model.ensemble_evaluate:
        with pytest.raises(ValueError, match="has no transformer dropout"):
            method(batch()[0], include_transformer_dropout=True)
    with pytest.raises(TypeError, match="include_transformer_dropout"):
        dropping().ensemble_predict(
            batch()[0], include_transformer_dropout="yes"
        )


# Disabled, removed, in files


def test_it_can_be_disabled_for_a_while():
    model = dropping(HIDDEN_KEY)
    weights = model.get_weights()
    plain, _ = step(compiled(adapted()))
    with model.disable_transformer_dropout():
        loss, _ = step(model)
        assert model.consistency is None
        with model.disable_transformer_dropout():
            pass
        history = model.fit(*batch(), verbose=0).history
        assert set(history) == {"loss"}
    assert_close(loss, plain)
    model.set_weights(weights)
    dropped, _ = step(model)
    assert abs(dropped - plain) > 1e-3


@pytest.mark.parametrize("how", ["remove", "merge"])
def test_nothing_is_left_of_it(how):
    x, y = batch()
    plain = small_transformer()
    before = [type(layer) for layer in descendants(plain)]
    model = dropping(HIDDEN_KEY)
    model.fit(x, y, verbose=0)
    outputs = model.predict(x, verbose=0)
    names = set(vars(adapted()))
    if how == "remove":
        model.remove_transformer_dropout()
        assert model.transformer_dropout is None
        assert not [n for n in vars(model) if "consistency" in n]
        assert set(model.fit(x, y, verbose=0).history) == {"loss"}
        kld.enable_transformer_dropout(model, **SETTINGS)
        model.remove_transformer_dropout()
        assert {n for n in set(vars(model)) - names if "dropout" in n} == set()
    else:
        model.merge_adapters()
        assert_close(model.predict(x, verbose=0), outputs, 1e-4)
        assert [type(layer) for layer in descendants(model)] == before
        kld.unmerge_adapters(model)
        assert model.consistency == HIDDEN_KEY["consistency"]
        assert_close(model.predict(x, verbose=0), outputs, 1e-4)
        model.merge_adapters()
    assert not mixed(model)
    for layer in descendants(model):
        assert not hasattr(layer, "dropout_settings")
        assert not hasattr(layer, "dropout_stream")


@pytest.mark.parametrize("settings", [SETTINGS, HIDDEN_KEY])
def test_a_saved_model_goes_on_as_it_would_have(tmp_path, settings):
    model = dropping(settings, dropout_rate=0.5, num_samples=2)
    model.train_on_batch(*batch())
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    assert copy.transformer_dropout == model.transformer_dropout
    assert len(mixed(copy)) == len(mixed(model)) > 0
    second = dropping(settings, dropout_rate=0.5, num_samples=2)
    second.load_weights(tmp_path / "model.weights.h5")
    logs = model.train_on_batch(*batch(), return_dict=True)
    for other in copy, second:
        again = other.train_on_batch(*batch(), return_dict=True)
        assert_close(again["loss"], logs["loss"])
        if "consistency_loss" in logs:
            assert_close(again["consistency_loss"], logs["consistency_loss"])


def test_recipes_find_layers_that_keras_has_numbered_anew():
    def build():
        x = inputs = keras.Input((4, 6))
        x = x + keras.layers.MultiHeadAttention(2, 3)(x, x)
        x = x + keras.layers.MultiHeadAttention(2, 3)(x, x)
        model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
        return kld.enable_lora_dropout(model, rank=2)

    first, second = build(), build()
    kld.enable_transformer_dropout(first, attention=kld.DropKey(), blocks=[1])
    kld.enable_transformer_dropout(second, attention=kld.DropKey(), blocks=[1])
    assert first.transformer_dropout != second.transformer_dropout
    moved = recipe.with_paths_of(second, recipe.recipe_of(first))
    settings = transformer_dropout.from_data(moved["transformer_dropout"])
    assert settings == second.transformer_dropout


def test_outputs_that_nothing_reads_are_not_averaged():
    model, (x, y) = dropping(HIDDEN_KEY, num_samples=2), batch()
    (drawn,) = objective.draw_passes(model, x)
    with masks.use_draws(objective.pass_draws(model, x, drawn)):
        *_, outputs = objective.pass_loss(model, x, y, None, None, None)
    assert outputs is None


def test_weights_fit_with_and_without_it(tmp_path):
    plain, model = compiled(adapted()), dropping(HIDDEN_KEY)
    for source, target in (plain, model), (model, plain):
        source.fit(*batch(), verbose=0)
        source.save_weights(tmp_path / "model.weights.h5")
        target.load_weights(tmp_path / "model.weights.h5")
        x = batch()[0]
        assert_close(target.predict(x, verbose=0), source.predict(x, verbose=0))
    source = dropping(HIDDEN_KEY)
    source.fit(*batch(), verbose=0)
    source.save_adapters(tmp_path / "adapters")
    plain.load_adapters(tmp_path / "adapters")
    assert_close(plain.predict(x, verbose=0), source.predict(x, verbose=0))


def test_adapters_of_another_kind_keep_it():
    model = dropping(HIDDEN_KEY, target_layers=["feedforward_output_dense"])
    budget = kld.RankBudget(target_rank=1, warmup_steps=1, final_steps=1)
    model.add_adapter("other", rank=2, rank_budget=budget)
    dropped = len(mixed(model))
    for name in "other", "default":
        model.set_adapter(name)
        assert len(mixed(model)) == dropped
    compiled(model)
    assert np.isfinite(step(model)[0])


def test_a_preset_keeps_it(tmp_path):
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=20,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=8,
    )
    model = keras_hub.models.BertTextClassifier(backbone, num_classes=2)
    kld.enable_lora_dropout(model, rank=2, seed=0)
    kld.enable_transformer_dropout(model, **HIDDEN_KEY)
    assert len(model.transformer_dropout.hidden_layers) == 2
    model.save_to_preset(str(tmp_path))
    copy = keras_hub.models.BertTextClassifier.from_preset(str(tmp_path))
    assert copy.transformer_dropout == model.transformer_dropout
    assert len(mixed(copy)) == len(mixed(model)) == 2 * 3 + 1
    x = {
        "token_ids": np.ones((2, 8), "int32"),
        "segment_ids": np.zeros((2, 8), "int32"),
        "padding_mask": np.ones((2, 8), "int32"),
    }
    assert_close(copy(x), model(x))
