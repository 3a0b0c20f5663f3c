"""The linear layers that can be adapted, and the axes of their kernels."""

import keras

from keras_lora_dropout.core import factors
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter


class AdaptedDense(LoRADropoutAdapter, keras.layers.Dense):
    """A `Dense` layer with an adapter of any factorization."""

    def __init__(
        self,
        units,
        *args,
        rank=8,
        alpha=None,
        dropout_rate=0.5,
        rescale=False,
        seed=None,
        **kwargs,
    ):
        _reject_keras_lora(kwargs)
        super().__init__(units, *args, **kwargs)
        self._set_adapter_settings(rank, alpha, dropout_rate, rescale, seed)

    def _factor_axes(self, kernel_shape):
        return factors.dense_axes(kernel_shape)


class AdaptedEinsumDense(LoRADropoutAdapter, keras.layers.EinsumDense):
    """An `EinsumDense` layer with an adapter of any factorization."""

    def __init__(
        self,
        equation,
        output_shape,
        *args,
        rank=8,
        alpha=None,
        dropout_rate=0.5,
        rescale=False,
        seed=None,
        **kwargs,
    ):
        _reject_keras_lora(kwargs)
        super().__init__(equation, output_shape, *args, **kwargs)
        self._set_adapter_settings(rank, alpha, dropout_rate, rescale, seed)

    def _factor_axes(self, kernel_shape):
        return factors.einsum_axes(
            self.equation, kernel_shape, self.input_spec.ndim
        )


def _reject_keras_lora(kwargs):
    """Refuse the constructor arguments of Keras's own LoRA."""
    for name in ("lora_rank", "lora_alpha"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(
                f"`{name}` belongs to Keras's own LoRA and is not allowed "
                f"here. Pass `{name.removeprefix('lora_')}` instead."
            )
