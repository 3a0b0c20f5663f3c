"""LoRA+: the second factors train at a rate of their own."""

import keras
import numpy as np
import pytest
from helpers import adapted_mlp
from helpers import array
from helpers import assert_close
from helpers import classification_data

import keras_lora_dropout as kld

RATIO = 7.0
BUDGET = {
    "rank_budget": kld.RankBudget(
        2,
        warmup_steps=10,
        final_steps=10,
        mask_interval=1,
        total_steps=30,
        orthogonal_penalty=0.0,
    )
}


def changes(optimizer, steps=1, **options):
    """What training steps add to each trainable weight, by path."""
    model = adapted_mlp({"optimizer": optimizer}, dropout_rate=0.0, **options)
    for _, layer in model.adapted_layers:
        if "rank_budget" in options:
            layer.lora_lambda.assign([1.0, 2.0])
    before = {w.path: array(w) for w in model.trainable_weights}
    x, y = classification_data(8)
    for _ in range(steps):
        model.train_on_batch(x, y)
    return {w.path: array(w) - before[w.path] for w in model.trainable_weights}


@pytest.mark.parametrize("options", [{}, BUDGET])
def test_second_factors_take_longer_steps(options):
    plain = changes(keras.optimizers.SGD(0.01), **options)
    plus = changes(kld.lora_plus(keras.optimizers.SGD(0.01), RATIO), **options)
    assert plain.keys() == plus.keys()
    seconds = [path for path in plain if path.endswith("/lora_kernel_b")]
    assert seconds and len(seconds) < len(plain) - 2
    for path, change in plain.items():
        assert np.abs(change).max() > 0
        assert_close(plus[path], change * (RATIO if path in seconds else 1.0))


def test_a_schedule_is_scaled_step_by_step():
    def optimizer():
        rates = keras.optimizers.schedules.PiecewiseConstantDecay
        return keras.optimizers.Adam(rates([0], [0.01, 0.002]))

    plus = kld.lora_plus(optimizer(), RATIO)
    first, second = changes(plus), changes(kld.lora_plus(optimizer(), RATIO), 2)
    for path, change in first.items():
        ratio = RATIO if path.endswith("/lora_kernel_b") else 1.0
        # The first step of Adam is the rate, whatever the gradient.
        moved = np.abs(change) > 1e-7
        assert_close(np.abs(change[moved]), 0.01 * ratio, 1e-3)
        step = np.abs(second[path] - change)[moved]
        assert step.max() < 0.0021 * ratio * 1.5
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(plus)
    )
    rates = [o.get_config()["learning_rate"] for o in plus.optimizers]
    assert rates == [o.get_config()["learning_rate"] for o in again.optimizers]


def test_training_goes_on_from_a_file(tmp_path):
    def fitted(model, epochs):
        x, y = classification_data(16)
        model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0)
        return model

    def build():
        return adapted_mlp(
            {"optimizer": kld.lora_plus(keras.optimizers.Adam())}
        )

    whole, half = fitted(fitted(build(), 1), 1), fitted(build(), 1)
    half.save(tmp_path / "half.keras")
    resumed = fitted(keras.models.load_model(tmp_path / "half.keras"), 1)
    for a, b in zip(whole.weights, resumed.weights, strict=True):
        assert_close(array(a), array(b))


def test_a_second_adapter_keeps_its_optimizer():
    model = adapted_mlp({"optimizer": kld.lora_plus(keras.optimizers.Adam())})
    x, y = classification_data(8)
    model.fit(x, y, verbose=0)
    model.add_adapter("other", rank=2)
    for name in "other", "default":
        model.set_adapter(name)
        assert isinstance(model.optimizer, keras.optimizers.MultiOptimizer)
        model.fit(x, y, verbose=0)
        assert np.isfinite(model.predict(x, verbose=0)).all()


@pytest.mark.parametrize(
    ("optimizer", "ratio", "error", "message"),
    [
        ("adam", 2, TypeError, "'adam'.*str"),
        (keras.optimizers.Adam(), 0, ValueError, "above 0.*ratio=0"),
        (keras.optimizers.Adam(), "2", ValueError, "above 0.*'2'"),
        (
            keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
            2,
            ValueError,
            "LossScale.*Wrap",
        ),
        (kld.lora_plus(keras.optimizers.Adam()), 2, ValueError, "a MultiOpti"),
        (
            keras.optimizers.Adam(gradient_accumulation_steps=2),
            2,
            ValueError,
            "accumulation_steps=2",
        ),
    ],
)
def test_bad_input(optimizer, ratio, error, message):
    with pytest.raises(error, match=message):
        kld.lora_plus(optimizer, ratio)


def test_an_optimizer_with_a_past_is_refused():
    optimizer = keras.optimizers.Adam()
    changes(optimizer)
    with pytest.raises(ValueError, match=r"adam.*built.*new one"):
        kld.lora_plus(optimizer)
