"""`rank_budget` as users meet it: fit, logs, patterns, compact models."""

import logging

import families
import keras
import numpy as np
import pytest
from adaptive_models import LOSS
from adaptive_models import adaptive
from adaptive_models import assert_compact_copy_agrees
from adaptive_models import fit
from helpers import BACKEND
from helpers import array
from helpers import assert_close
from helpers import classification_data
from helpers import tiny_mlp

import keras_lora_dropout as kld


def schedule_of(model):
    """`[total_steps, warmup_steps, freeze_step, mask_interval]`."""
    return list(array(model.rank_allocator.schedule))


def values_of(model):
    return [array(variable) for variable in model.weights]


def test_initial_rank_and_scaling():
    model = adaptive(
        kld.RankBudget(2, initial_rank=3), rank=8, alpha=6, dropout_rate=0.3
    )
    for _, layer in model.adapted_layers:
        assert isinstance(layer, kld.AdaLoRADropoutDense)
        assert layer.lora_rank == 3
        assert layer.scaling == 2.0
        assert layer.dropout_rate == 0.3
        assert_close(layer.lora_lambda, np.zeros(3))
        for factor in (layer.lora_kernel_a, layer.lora_kernel_b):
            assert 0.005 < array(factor).std() < 0.05
    assert model.rank_pattern() == {"first": 3, "second": 3}
    assert model.rank_budget == kld.RankBudget(2, initial_rank=3)


def test_fresh_adapters_change_nothing():
    x, _ = classification_data()
    plain = tiny_mlp()
    expected = plain.predict(x, verbose=0)
    model = adaptive(model=plain)
    assert_close(model.predict(x, verbose=0), expected)
    assert_close(model.ensemble_predict(x, verbose=0), expected)


@pytest.mark.parametrize(
    "budget, error, message",
    [
        (4, TypeError, "must be a `RankBudget`.*rank_budget=4 .*int"),
        ({"target_rank": 2}, TypeError, "`RankBudget`.*of type dict"),
        (kld.RankBudget(5), ValueError, "target_rank=5, initial_rank=4"),
        (
            kld.RankBudget(2, initial_rank=7),
            ValueError,
            "`rank` is larger than.*at most 6.*rank=7",
        ),
    ],
)
def test_refused_budgets_leave_the_model_as_it_was(budget, error, message):
    model = tiny_mlp()
    before = values_of(model)
    with pytest.raises(error, match=message):
        adaptive(budget, model=model)
    assert type(model.get_layer("first")) is keras.layers.Dense
    for ours, theirs in zip(values_of(model), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_fit_derives_the_schedule_and_logs_the_budget():
    model = adaptive(kld.RankBudget(2, warmup_steps=0.1, final_steps=0.5))
    assert model.rank_allocator.total_steps is None
    x, y = classification_data(16)
    history = fit(model, validation_data=(x, y))
    assert schedule_of(model) == [20, 2, 10, 1]
    # After steps 4, 8, 12, 16, 20; worked by hand: 4 * (1 - 2/8)**3 + 4 = 5.7.
    assert history["budget"] == [5, 4, 4, 4, 4]
    assert sum(model.rank_pattern().values()) == 4
    penalties = history["orthogonal_penalty"]
    assert 0 < penalties[-1] < penalties[0]
    assert "val_loss" in history
    assert not any(name.startswith("val_bud") for name in history)
    assert not any(name.startswith("val_orth") for name in history)
    assert isinstance(model.evaluate(x, y, verbose=0), float)


def test_loss_and_metrics_are_means_over_the_epoch():
    """The extra logs do not turn them into those of the last batch."""
    model = adaptive(dropout_rate=0.0, optimizer=keras.optimizers.SGD(0.0))
    model.compile(keras.optimizers.SGD(0.0), LOSS, metrics=["accuracy"])
    x, y = classification_data(16)
    history = fit(model, epochs=3)
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert_close(history["loss"][0], expected["loss"])
    assert_close(history["accuracy"][0], expected["accuracy"])


def test_accumulated_batches_make_fewer_steps():
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    model = adaptive(optimizer=optimizer)
    fit(model)
    assert schedule_of(model)[0] == 10
    assert int(array(model.rank_allocator.step)) == 10


def generate(batches=8):
    x, y = classification_data(4)
    for _ in range(batches):
        yield x, y


# Keras says so at the end of any generator.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_data_of_unknown_length():
    model = adaptive()
    with pytest.raises(
        ValueError, match=r"(?s)length of the data.*total_steps"
    ):
        model.fit(generate(), shuffle=False, verbose=0)
    # The failed call has changed nothing; both ways out work.
    model.fit(generate(batches=20), steps_per_epoch=8, shuffle=False, verbose=0)
    assert schedule_of(model)[0] == 8
    model = adaptive(kld.RankBudget(2, total_steps=8))
    model.fit(generate(), shuffle=False, verbose=0)
    assert sum(model.rank_pattern().values()) == 4


def test_a_run_shorter_than_its_phases():
    model = adaptive(kld.RankBudget(2, warmup_steps=12, final_steps=8))
    before = values_of(model)
    with pytest.raises(
        ValueError,
        match=r"run of 20 optimizer steps.*warmup_steps=12 and final_steps=8",
    ):
        fit(model)
    for ours, theirs in zip(values_of(model), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    fit(model, epochs=6)
    assert sum(model.rank_pattern().values()) == 4


def test_train_on_batch_needs_the_length_of_the_run():
    model = adaptive()
    with pytest.raises(ValueError, match=r"`train_on_batch` .*`total_steps`"):
        model.train_on_batch(*classification_data(4))
    fit(model, epochs=2)  # Now it is known.
    model.train_on_batch(*classification_data(4))


def test_a_later_fit_goes_on_with_the_same_schedule():
    model = adaptive(kld.RankBudget(2, total_steps=20))
    assert fit(model, epochs=2)["budget"] == [5, 4]
    assert fit(model, epochs=3)["budget"] == [4, 4, 4]
    pattern, kept = model.rank_pattern(), array(model.rank_allocator.rank_mask)
    assert fit(model, epochs=1)["budget"] == [4]
    assert model.rank_pattern() == pattern
    np.testing.assert_array_equal(array(model.rank_allocator.rank_mask), kept)
    assert schedule_of(model) == [20, 2, 10, 1]


def test_callbacks_in_every_form():
    class Steps(keras.callbacks.Callback):
        count = 0

        def on_train_batch_end(self, batch, logs=None):
            self.count += 1
            assert {"budget", "orthogonal_penalty", "loss"} <= set(logs)

    x, y = classification_data(16)
    for form in (
        lambda callback: callback,
        lambda callback: [callback],
        lambda callback: (callback, keras.callbacks.TerminateOnNaN()),
    ):
        callback, model = Steps(), adaptive()
        fit(model, callbacks=form(callback))
        assert callback.count == 20
        assert schedule_of(model)[0] == 20
    # All arguments in their places.
    model, callback = adaptive(), Steps()
    model.fit(x, y, 4, 5, 0, [callback])
    assert callback.count == 20
    model, callback = adaptive(), Steps()
    callbacks = keras.callbacks.CallbackList(
        [callback], add_history=True, model=model, epochs=5, steps=4
    )
    fit(model, callbacks=callbacks)
    assert callback.count == 20
    assert schedule_of(model)[0] == 20


def test_the_best_weights_come_back_with_their_ranks():
    model = adaptive()
    keep_first = keras.callbacks.EarlyStopping(
        "budget", mode="max", patience=99, restore_best_weights=True
    )
    fit(model, callbacks=[keep_first])
    assert sum(model.rank_pattern().values()) == 5
    for path, layer in model.adapted_layers:
        kept = np.count_nonzero(array(layer.lora_lambda))
        assert kept == model.rank_pattern()[path]


def test_an_interrupted_fit_goes_on_where_it_was(tmp_path):
    """`BackupAndRestore`, an error in the third epoch, a new model."""

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(*callbacks, interrupted=False):
        model = adaptive()
        backup = keras.callbacks.BackupAndRestore(tmp_path)
        extra = [backup, *callbacks] if interrupted else list(callbacks)
        return model, lambda: fit(model, callbacks=extra, shuffle=False)

    _, train = run(Interrupt(), interrupted=True)
    with pytest.raises(KeyboardInterrupt):
        train()
    resumed, train = run(interrupted=True)
    assert len(train()["loss"]) == 3
    whole, train = run()
    train()
    assert schedule_of(resumed) == schedule_of(whole)
    np.testing.assert_array_equal(
        array(resumed.rank_allocator.step), array(whole.rank_allocator.step)
    )
    for ours, theirs in zip(values_of(resumed), values_of(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    history = resumed.rank_history()
    np.testing.assert_array_equal(history["step"], range(1, 21))
    for path, ranks in whole.rank_history()["ranks"].items():
        np.testing.assert_array_equal(history["ranks"][path], ranks)


def test_rank_history_follows_every_step():
    model = adaptive()
    patterns = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: patterns.append(model.rank_pattern())
    )
    fit(model, callbacks=[record])
    history = model.rank_history()
    np.testing.assert_array_equal(history["step"], range(1, 21))
    assert list(history["ranks"]) == ["first", "second"]
    for epoch, pattern in enumerate(patterns):
        for path, kept in pattern.items():
            assert history["ranks"][path][4 * epoch + 3] == kept


def test_rank_history_of_a_long_run_has_a_fixed_length():
    model = adaptive(kld.RankBudget(2, total_steps=500), num_samples=1)
    x, y = classification_data(4)
    assert len(model.rank_history()["step"]) == 0
    for _ in range(11):
        model.train_on_batch(x, y)
    # 2.5 steps to a record: steps 3, 5, 8, 10, and 11 so far.
    np.testing.assert_array_equal(
        model.rank_history()["step"], [3, 5, 8, 10, 11]
    )


def test_models_without_a_budget():
    model = kld.enable_lora_dropout(tiny_mlp(), rank=3)
    assert model.rank_pattern() == {"first": 3, "second": 3}
    assert model.rank_budget is None
    for method in (model.compact_ranks, model.rank_history):
        with pytest.raises(ValueError, match="`rank_budget=RankBudget"):
            method()


def hand_built(*ranks, **options):
    x = inputs = keras.Input((6,))
    for index, rank in enumerate(ranks):
        x = kld.AdaLoRADropoutDense(
            8, "tanh", rank=rank, name=f"hidden_{index}", seed=index
        )(x)
    outputs = keras.layers.Dense(3, name="head")(x)
    model = kld.LoRADropoutModel(inputs, outputs, num_samples=2, **options)
    model.compile(keras.optimizers.Adam(0.05), LOSS)
    return model


def test_hand_built_model_with_ranks_of_its_own():
    model = hand_built(2, 5, 3, rank_budget=kld.RankBudget(2))
    assert fit(model)["budget"][-1] == 6
    pattern = model.rank_pattern()
    assert list(pattern) == ["hidden_0", "hidden_1", "hidden_2"]
    assert sum(pattern.values()) == 6
    assert_compact_copy_agrees(model)


@pytest.mark.parametrize(
    "budget, message",
    [
        (
            kld.RankBudget(2, initial_rank=5),
            "`initial_rank` differs.*initial_rank=5.*'hidden_0': 2",
        ),
        (kld.RankBudget(4), "target_rank=4, initial_rank=3.5"),
    ],
)
def test_hand_built_model_with_a_budget_that_does_not_fit(budget, message):
    with pytest.raises(ValueError, match=message):
        hand_built(2, 5, rank_budget=budget)


def test_a_budget_needs_layers_that_adapt():
    inputs = keras.Input((6,))
    outputs = kld.LoRADropoutDense(3, rank=2)(inputs)
    with pytest.raises(ValueError, match="no layer whose rank adapts"):
        kld.LoRADropoutModel(inputs, outputs, rank_budget=kld.RankBudget(2))


def test_layers_that_would_adapt_but_have_no_budget(caplog):
    model = hand_built(2, 2)
    with caplog.at_level(logging.WARNING, logger="keras_lora_dropout"):
        fit(model, epochs=1)
    assert "no rank will be pruned" in caplog.text
    assert "hidden_0" in caplog.text


class Subclassed(kld.LoRADropoutModel):
    """A model that is built when it first sees data."""

    def __init__(self, **options):
        super().__init__(**options)
        self.hidden = kld.AdaLoRADropoutDense(
            8, "tanh", rank=4, seed=0, name="hidden"
        )
        self.head = keras.layers.Dense(3)

    def call(self, inputs):
        return self.head(self.hidden(inputs))


def test_subclassed_model(tmp_path):
    model = Subclassed(num_samples=2, rank_budget=kld.RankBudget(2), seed=0)
    model.compile(keras.optimizers.Adam(0.05), LOSS)
    if BACKEND == "tensorflow":  # It builds models inside the first step.
        with pytest.raises(ValueError, match="Call the model on a batch"):
            fit(model)
        model(classification_data()[0])
    fit(model)
    assert list(model.rank_pattern().values()) == [2]
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = Subclassed(num_samples=2, rank_budget=kld.RankBudget(2))
    x, _ = classification_data()
    loaded(x)
    loaded.load_weights(tmp_path / "model.weights.h5")
    assert loaded.rank_pattern() == model.rank_pattern()
    assert_close(loaded(x), model(x))
    assert_compact_copy_agrees(model)


def test_unbuilt_model_in_train_on_batch():
    budget = kld.RankBudget(2, total_steps=9)
    model = Subclassed(rank_budget=budget)
    model.compile("sgd", LOSS)
    x, y = classification_data(4)
    with pytest.raises(ValueError, match="not built, so `train_on_batch`"):
        model.train_on_batch(x, y)
    model(x)
    model.train_on_batch(x, y)


def test_keras_hub_task():
    """All linear layers of a real task, raw strings in, ranks out."""
    model = families.deberta()
    kld.enable_lora_dropout(
        model,
        rank=3,
        rank_budget=kld.RankBudget(1, warmup_steps=1, final_steps=2),
        num_samples=2,
        mask_sharing="example",
        seed=0,
    )
    model.compile(keras.optimizers.Adam(0.02), LOSS)
    x, y = families.data_of(families.deberta)
    history = model.fit(
        x, y, batch_size=3, epochs=4, shuffle=False, verbose=0
    ).history
    layers = len(model.adapted_layers)
    assert history["budget"][-1] == layers
    pattern = model.rank_pattern()
    assert sum(pattern.values()) == layers
    assert list(pattern) == [path for path, _ in model.adapted_layers]
    expected = model.predict(x, batch_size=3, verbose=0)
    model.compact_ranks()
    assert_close(model.predict(x, batch_size=3, verbose=0), expected)
    assert layers == sum(
        lyr.lora_lambda.shape[0] for _, lyr in model.adapted_layers
    )
