"""LoRA+: another learning rate for the second factor of the adapters.

Reference: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models",
2024, https://arxiv.org/abs/2402.12354.
"""

import keras

from keras_lora_dropout.core import validation

# Matches the whole path of a variable.
_SECOND_FACTORS = "(.*/)?lora_kernel_b"


def lora_plus(optimizer, learning_rate_ratio=16.0):
    """Let an optimizer train the B factors at a higher learning rate: LoRA+.

    B starts at zeros, A does not; with one learning rate for both, features of
    wide models are learned inefficiently. Everything else that trains, the head
    included, keeps the rate of the optimizer. Of AdaLoRA, B is P.

    The result is a `keras.optimizers.MultiOptimizer` of two, which each clip
    gradients for themselves. It has no `learning_rate` for callbacks to set;
    give the optimizer a schedule instead.

    Reference: [Hayou et al., 2024](https://arxiv.org/abs/2402.12354), section
    4. They recommend a ratio of about 16, and a learning rate below that of
    LoRA.

    Args:
        optimizer: A `keras.optimizers.Optimizer` that has taken no step. It
            becomes part of the result.
        learning_rate_ratio: Number from 1e-20 to 1e20. Learning rate of B over
            that of everything else. Defaults to 16.

    Returns:
        An optimizer, for `model.compile`.

    Raises:
        TypeError: If `optimizer` is no optimizer.
        ValueError: If it is built, scales losses, holds several optimizers or
            accumulates gradients, or if the ratio is not positive.

    Example:

    >>> optimizer = lora_plus(keras.optimizers.Adam(2e-4))
    >>> [round(float(o.learning_rate), 6) for o in optimizer.optimizers]
    [0.0032, 0.0002]
    """
    ratio = validation.number(
        "learning_rate_ratio",
        learning_rate_ratio,
        "above 0, from 1e-20 to 1e20",
        low=1e-20,
        high=1e20,
    )
    _check(optimizer)
    config = optimizer.get_config()
    rate = config["learning_rate"]
    if isinstance(rate, dict):
        schedule = keras.optimizers.schedules.deserialize(rate)
        rate = ScaledSchedule(schedule, ratio)
    else:
        rate = rate * ratio
    second = type(optimizer).from_config(
        {**config, "learning_rate": rate, "name": f"{optimizer.name}_b"}
    )
    optimizers = keras.optimizers.OptimizerMap(
        optimizer, {_SECOND_FACTORS: second}
    )
    return keras.optimizers.MultiOptimizer(optimizers)


@keras.saving.register_keras_serializable(package="keras_lora_dropout")
class ScaledSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate schedule times a number.

    Args:
        schedule: A `LearningRateSchedule`.
        factor: Number.
    """

    def __init__(self, schedule, factor):
        super().__init__()
        self.schedule, self.factor = schedule, factor

    def __call__(self, step):
        return self.schedule(step) * self.factor

    def get_config(self):
        serialize = keras.optimizers.schedules.serialize
        return {"schedule": serialize(self.schedule), "factor": self.factor}

    @classmethod
    def from_config(cls, config):
        deserialize = keras.optimizers.schedules.deserialize
        return cls(deserialize(config["schedule"]), config["factor"])


def _check(optimizer):
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "`optimizer` must be a `keras.optimizers.Optimizer`, e.g. "
            f"keras.optimizers.Adam(2e-4). Received: {optimizer!r} (of type "
            f"{type(optimizer).__name__})."
        )
    several = (
        keras.optimizers.LossScaleOptimizer,
        keras.optimizers.MultiOptimizer,
    )
    if isinstance(optimizer, several):
        raise ValueError(
            "`lora_plus` takes the optimizer of the weights itself. Received: "
            f"a {type(optimizer).__name__}. Wrap the result of `lora_plus` in "
            "it instead, if it scales losses."
        )
    if optimizer.built:
        raise ValueError(
            "`lora_plus` takes an optimizer that has taken no step. Received: "
            f"{optimizer.name!r}, which is built. Pass a new one."
        )
    if optimizer.gradient_accumulation_steps:
        raise ValueError(
            "`lora_plus` takes no optimizer that accumulates gradients: a "
            "`MultiOptimizer` would count each of its steps. Received: "
            f"gradient_accumulation_steps="
            f"{optimizer.gradient_accumulation_steps}. Leave that out, or use "
            '`sampling="sequential"` if memory is short.'
        )
