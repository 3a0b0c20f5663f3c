"""The paper's theory in numbers: sparsity, error bounds, gain of the ensemble.

The bounds are those of section 4 of
[Lin et al., 2024](https://arxiv.org/abs/2404.09610), and hold under the
paper's assumptions: a Lipschitz loss of bounded range, an optimum that moves
little when one example is left out, and a positive-semidefinite Hessian there.
Nobody can check these for a real network, and its constants are unknown. Read
how a bound moves with the dropout rate, not what it is.
"""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_lora_dropout.conversion.model import AdaptedModel
from keras_lora_dropout.core import validation

# Between these, no bound is lost by the way to it.
_CONSTANTS = 1e-100, 1e100


def sparsity(dropout_rate):
    """Expected share of zeros in a masked delta: `2p - p^2`.

    An entry of the delta is zero if its input feature or its output feature is
    dropped.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), section
    4.1.

    Args:
        dropout_rate: Number or array of numbers in `[0, 1]`.

    Returns:
        Float or NumPy array of the same shape.

    Raises:
        ValueError: If a rate lies outside `[0, 1]`.

    Example:

    >>> sparsity(0.5)
    0.75
    """
    rate = _rates(dropout_rate)
    return _plain(rate * (2 - rate))


@dataclasses.dataclass(frozen=True)
class GeneralizationBound:
    """Bound of the generalization error as a function of the dropout rate.

    Under the paper's assumptions, the expected loss of a model that was
    fine-tuned with LoRA Dropout exceeds its training loss by no more than
    `gap`, with a probability of at least `1 - failure_probability`. The gap
    shrinks with the dropout rate; the training loss, which the theory does not
    predict, grows.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610),
    Proposition 4.2 and Theorem 4.4.

    Args:
        num_examples: Positive integer `n`. Number of training examples.
        lipschitz: Positive number. Lipschitz constant of the loss in the
            parameters (the paper's eta). Defaults to 1.
        smallest_eigenvalue: Number, 0 or more. Smallest eigenvalue of the
            loss's Hessian at the optimum (Lambda_min). Defaults to 0, a
            direction in which the loss is flat.
        regularization: Number, 0 or more. Strength of the sparsity
            regularization that dropout stands for (lambda). Defaults to 1.
        loss_range: Positive number. Largest difference between the losses of
            two examples (C). Defaults to 1.
        failure_probability: Number in `(0, 1)`. Chance that the bound does not
            hold (delta). Defaults to 0.05.

    Raises:
        ValueError: If an argument is out of range; of the constants, 1e-100
            and 1e100 are the limits.

    Example:

    >>> bound = GeneralizationBound(num_examples=3668, smallest_eigenvalue=0.1)
    >>> print(bound.gap([0.0, 0.5]).round(2))
    [0.81 0.21]
    """

    num_examples: int
    lipschitz: float = 1.0
    smallest_eigenvalue: float = 0.0
    regularization: float = 1.0
    loss_range: float = 1.0
    failure_probability: float = 0.05

    def __post_init__(self):
        count = validation.positive_integer(
            "num_examples", self.num_examples, at_most=2**53
        )
        checked = {"num_examples": count}
        for name in ("lipschitz", "loss_range"):
            checked[name] = validation.number(
                name,
                getattr(self, name),
                "finite and above 0, from 1e-100 to 1e100",
                *_CONSTANTS,
            )
        for name in ("smallest_eigenvalue", "regularization"):
            checked[name] = validation.number(
                name,
                getattr(self, name),
                "finite, 0 or more, to 1e100",
                high=_CONSTANTS[1],
            )
        checked["failure_probability"] = validation.number(
            "failure_probability",
            self.failure_probability,
            "between 0 and 1",
            low=0,
            high=1,
        )
        validation.keep(self, **checked)

    def stability(self, dropout_rate):
        """Bound of the pointwise hypothesis stability, [L] Eq. 13.

        How much the loss of a training example changes, on average, if the
        model is trained without it.

        Args:
            dropout_rate: Number or array of numbers in `[0, 1]`.

        Returns:
            Float or NumPy array of the same shape; infinite where neither the
            Hessian nor dropout holds the optimum in place.
        """
        zeros = np.asarray(sparsity(dropout_rate))
        curvature = self.smallest_eigenvalue + 2 * self.regularization * zeros
        with np.errstate(divide="ignore", over="ignore", under="ignore"):
            flatness = np.divide(self.lipschitz, curvature)
            bound = flatness * (2 * self.lipschitz / self.num_examples)
        return _plain(np.where(curvature > 0, bound, np.inf))

    def gap(self, dropout_rate):
        """Bound of expected loss minus training loss, [L] Eq. 15.

        Args:
            dropout_rate: Number or array of numbers in `[0, 1]`.

        Returns:
            Float or NumPy array of the same shape, as `stability`.
        """
        n, c = self.num_examples, self.loss_range
        stability = np.asarray(self.stability(dropout_rate))
        # [L] Eq. 14, with the bound of Eq. 13 in it.
        with np.errstate(over="ignore", under="ignore", divide="ignore"):
            spread = np.square(c) + 12 * c * n * stability
            chance = 2 * n * self.failure_probability
            return _plain(np.sqrt(spread / chance))


@dataclasses.dataclass(frozen=True)
class EnsembleGain:
    """Both sides of [L] Eq. 16 on some data.

    Attributes:
        ensemble_loss: Float. Loss of the averaged output of N mask instances.
        instance_losses: Tuple of N floats. Loss of each instance alone.

    Example:

    >>> EnsembleGain(ensemble_loss=0.5, instance_losses=(0.5, 0.75)).gain
    0.125
    """

    ensemble_loss: float
    instance_losses: tuple

    @property
    def mean_instance_loss(self):
        """Mean loss of the instances, which [L] Eq. 16 bounds the other by."""
        return float(np.mean(self.instance_losses))

    @property
    def gain(self):
        """How much less the ensemble loses: 0 or more if Eq. 16 holds."""
        return self.mean_instance_loss - self.ensemble_loss


def ensemble_gain(
    model,
    x,
    y,
    *,
    sample_weight=None,
    num_samples=None,
    batch_size=None,
    seed=None,
    verbose="auto",
):
    """Measure whether an ensemble loses less than its instances do.

    By Theorem 4.5 it does for a loss that is convex in the model's output, such
    as cross entropy of logits or of probabilities, or a squared error. The
    theorem needs no other assumption, and holds for each set of N instances.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 16.

    Args:
        model: An adapted model, compiled with a loss.
        x: Inputs, whatever `ensemble_predict` accepts.
        y: Labels, one for each example, as the compiled loss takes them.
        sample_weight: Weights of the examples, or `None`.
        num_samples: Number N of instances, or `None` for the model's own.
        batch_size: Integer or `None`, as in `predict`.
        seed: Integer or `None`, as in `ensemble_predict`.
        verbose: As in `predict`.

    Returns:
        An `EnsembleGain`.

    Raises:
        TypeError: If the model is not adapted.
        ValueError: If the model is not compiled with a loss, or numbers of
            labels and inputs differ.

    Example:

    >>> inputs = keras.Input((3,))
    >>> outputs = keras.layers.Dense(2, name="only")(inputs)
    >>> model = keras.Model(inputs, outputs)
    >>> model = enable_lora_dropout(model, rank=2, target_layers=["only"])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.ones((4, 3)), np.ones((4, 2))
    >>> ensemble_gain(model, x, y, verbose=0).gain >= -1e-6
    True
    """
    if not isinstance(model, AdaptedModel):
        raise TypeError(
            "`ensemble_gain` needs an adapted model, as `enable_lora_dropout` "
            f"returns it. Received: model of type {type(model).__name__}."
        )
    if getattr(model, "loss", None) is None:
        raise ValueError(
            "`ensemble_gain` measures the loss that the model was compiled "
            "with, and there is none. Call `model.compile(optimizer, loss)` "
            "first."
        )
    with model._seed_kept():
        samples = model.ensemble_predict(
            x,
            batch_size=batch_size,
            num_samples=num_samples,
            seed=seed,
            return_samples=True,
            verbose=verbose,
        )
        return _gain_of(model, samples, y, sample_weight)


def _gain_of(model, samples, y, sample_weight):
    """The losses of the outputs of all instances, and of their mean."""
    leaves = keras.tree.flatten(samples)
    examples = {len(leaf) for leaf in keras.tree.flatten(y)}
    if examples != {leaves[0].shape[1]}:
        raise ValueError(
            "`y` needs one label for each example. Received: "
            f"{' and '.join(map(str, sorted(examples)))} labels for "
            f"{leaves[0].shape[1]} examples in x."
        )
    labels = keras.tree.map_structure(ops.convert_to_tensor, y)

    def loss(outputs):
        outputs = keras.tree.map_structure(ops.convert_to_tensor, outputs)
        value = model.compute_loss(
            y=labels, y_pred=outputs, sample_weight=sample_weight
        )
        return float(ops.convert_to_numpy(value))

    return EnsembleGain(
        loss(keras.tree.map_structure(lambda leaf: leaf.mean(0), samples)),
        tuple(
            loss(keras.tree.map_structure(lambda leaf, n=n: leaf[n], samples))
            for n in range(len(leaves[0]))
        ),
    )


def _rates(dropout_rate):
    rate = validation.numbers_of(dropout_rate)
    if rate is None or not ((rate >= 0) & (rate <= 1)).all():
        raise ValueError(
            "`dropout_rate` must lie in [0, 1], a number or an array of "
            "numbers. Received: dropout_rate="
            f"{validation.shown(dropout_rate)} (of type "
            f"{type(dropout_rate).__name__})."
        )
    return rate


def _plain(array):
    """Return a number for what came from one."""
    return float(array) if np.ndim(array) == 0 else array
