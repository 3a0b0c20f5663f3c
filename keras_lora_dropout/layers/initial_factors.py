"""Adapters that start at factors whose product is not zero."""

from keras import ops

from keras_lora_dropout.core import masks
from keras_lora_dropout.core.keras_internals import forget_attributes

INITIAL_NAMES = ("initial_kernel_a", "initial_kernel_b")


class InitialFactors:
    """Mixin of adapted layers: what the factors started at is subtracted.

    PiSSA and OLoRA start at factors with a product, which must not change what
    the model computes. PEFT subtracts it from the frozen kernel. Here kernels
    stay bit for bit what they are: the layer has frozen copies of the two
    factors, and computes with `kernel - mean_scale * A0 @ B0` in the place of
    `kernel`. Masks never cover that part, so the mean network starts at the
    base model.

    A layer without such factors has no weights for them.
    """

    @property
    def mean_scale(self):
        """Multiplier of the delta in the mean network."""
        return masks.delta_scale(
            self.scaling, self.dropout_rate, self.rescale, masked=False
        )

    @property
    def initial_factors(self):
        """Frozen copies of the factors' start; empty if its product is zero."""
        return [vars(self)[n] for n in INITIAL_NAMES if n in vars(self)]

    @property
    def adapter_weights(self):
        """Dictionary of name -> weight: the factors, then the initial ones."""
        names = *self.factor_names, *INITIAL_NAMES
        return {n: getattr(self, n) for n in names if n in vars(self)}

    def hold_initial_factors(self, wanted):
        """Have weights for initial factors, zeros if they are new, or none."""
        if bool(self.initial_factors) == wanted:
            return
        if not wanted:
            forget_attributes(self, INITIAL_NAMES)
            return
        shapes = self.lora_kernel_a.shape, self.lora_kernel_b.shape
        for name, shape in zip(INITIAL_NAMES, shapes, strict=True):
            self._add_adapter_weight(
                name, shape, "zeros", self._axes, trainable=False
            )

    def minus_initial(self, factor_a, factor_b):
        """Subtract `mean_scale * A0 @ B0` from a product, as further ranks.

        Args:
            factor_a: Tensor of shape `(..., input_dim, rank)`.
            factor_b: Tensor of shape `(..., rank, output_dim)`.

        Returns:
            Two factors, of twice the rank if there is something to subtract.
        """
        if not self.initial_factors:
            return factor_a, factor_b
        a, b = (ops.cast(f, factor_a.dtype) for f in self.initial_factors)
        a = ops.broadcast_to(a, ops.shape(factor_a))
        b = ops.broadcast_to(-self.mean_scale * b, ops.shape(factor_b))
        return (
            ops.concatenate([factor_a, a], axis=-1),
            ops.concatenate([factor_b, b], axis=-2),
        )
