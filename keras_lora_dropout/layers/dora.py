"""DoRA: the magnitude of each output feature apart from its direction."""

import keras
from keras import ops

from keras_lora_dropout.core import factors
from keras_lora_dropout.layers.adapt import adapts_by
from keras_lora_dropout.layers.linear import AdaptedDense
from keras_lora_dropout.layers.linear import AdaptedEinsumDense
from keras_lora_dropout.layers.lora_dropout import LoRAFactors


class DoRAFactors(LoRAFactors):
    """Mixin: columns of the kernel plus `A @ B` have a magnitude of their own.

    Where `V = kernel + scaling * A @ B`, the kernel in force is `magnitude * V
    / norm(V)`, with the norm of each column. It is taken as a constant in the
    gradient, as in section 4.3 of the paper.

    The norm is that of the mean network, whatever the masks: so a mask drops
    what an adapter adds and does not rescale the kernel.

    Reference: [Liu et al., 2024](https://arxiv.org/abs/2402.09353), Eq. 5, 11.
    """

    kind = "DoRA"
    quantization_modes = ()  # The norm needs the kernel's own numbers.
    factor_names: tuple[str, ...] = (
        "lora_kernel_a",
        "lora_magnitude",
        "lora_kernel_b",
    )

    @staticmethod
    def _initial_factors(streams):
        a, b = LoRAFactors._initial_factors(streams)
        return a, "zeros", b

    @staticmethod
    def _factor_shapes(axes, rank):
        a, b = LoRAFactors._factor_shapes(axes, rank)
        return a, (axes.output_dim,), b

    def _factor_pair(self, lora_kernel_a, lora_magnitude, lora_kernel_b):
        return lora_kernel_a, lora_kernel_b

    def factors_from_kernel(self):
        norms = factors.column_norms(self._kernel, self._axes)
        return {"lora_magnitude": norms}

    def gain(self):
        """What output features are multiplied by, float32 `(output_dim,)`."""
        a, b = map(ops.convert_to_tensor, self._factor_pair(*self.factors))
        pair = self.minus_initial(a, b * self.mean_scale)
        norms = factors.column_norms(self._kernel, self._axes, *pair)
        magnitude = ops.convert_to_tensor(self.lora_magnitude)
        return ops.divide_no_nan(magnitude, ops.stop_gradient(norms))


adapts_by(
    DoRAFactors,
    {
        keras.layers.Dense: AdaptedDense,
        keras.layers.EinsumDense: AdaptedEinsumDense,
    },
)
