"""`Dense` and `EinsumDense` with an adapter of any factorization."""

import math

import keras
from keras import ops

from keras_lora_dropout.core import factors
from keras_lora_dropout.core import products
from keras_lora_dropout.layers import quantized
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter
from keras_lora_dropout.layers.adapter import plain_class


class AdaptedLinear(LoRADropoutAdapter):
    """Mixin of a layer whose kernel is one matrix, whatever its axes."""

    quantization_modes = quantized.MODES

    def _adapted_product(self, inputs, training):
        """The kernel's product, the adapter's part and the bias, [L] Eq. 2-3.

        `diag(mask_a) A` and `B diag(mask_b)` are formed once per mask, in the
        size of the factors; activations are never multiplied by a mask.

        Returns:
            The layer's output; a tuple of its parts where the pass asks for
            them.
        """
        axes = self._axes
        factor_a, factor_b, keep = self._current_factors(training)
        shared = in_parts = False
        if keep is not None:
            shared, in_parts = self._what_is_shared()
            if not shared:
                groups = keep[0].shape[0]
                self._check_groups(inputs, groups, axes.batch_leads)
        factor_a, factor_b = factors.masked_pair(factor_a, factor_b, keep)
        factor_a, factor_b = self.minus_initial(factor_a, factor_b)
        gain = self.gain()
        if gain is not None:
            gain = ops.cast(gain, self.compute_dtype)
            factor_b = factor_b * gain
        pair = factor_a, factor_b, axes
        if in_parts:
            base = self._frozen_product(inputs, gain)
            return base, *products.shared_parts(inputs, *pair)
        if quantized.is_quantized(self):
            delta = products.delta_product(inputs, *pair, shared=shared)
            return ops.add(self._frozen_product(inputs), delta)
        in_groups = self._multiplies_in_groups(inputs, factor_a)
        bias = self._bias_of_rows()
        product = products.adapted_product(
            inputs,
            self.kernel,
            *pair,
            shared=shared,
            in_groups=in_groups,
            gain=gain,
            bias=bias,
        )
        return self._plus_bias(product) if bias is None else product

    def _bias_of_rows(self):
        """The bias if a product takes it along, which saves a pass on torch."""
        on_torch = keras.config.backend() == "torch"
        if not on_torch or self.bias is None:
            return None
        bias = self.bias.value
        return bias if self._axes.belongs_to_rows(bias.shape) else None

    def _plus_bias(self, x):
        return x if self.bias is None else ops.add(x, self.bias)

    def _frozen_product(self, inputs, gain=None):
        """What the layer puts out without its factors and its activation."""
        if quantized.is_quantized(self):
            plain = plain_class(type(self))
            product = quantized.quantized_product(self, inputs, plain)
            return self._plus_bias(product)
        bias = self._bias_of_rows()
        product = products.kernel_product(
            inputs, self.kernel, self._axes, gain, bias
        )
        return self._plus_bias(product) if bias is None else product

    def _multiplies_in_groups(self, inputs, factor_a):
        """Whether the kernel's product has the layout of the mask groups.

        XLA computes what two layouts read, such as an activation, once for
        each. That is worse than a copy of the kernel for each group, unless
        groups are small.
        """
        axes, shape = self._axes, inputs.shape
        if keras.config.backend() != "jax" or len(factor_a.shape) == 2:
            return False
        groups = factor_a.shape[0]
        if not all(isinstance(size, int) for size in (groups, *shape)):
            return False
        rows = math.prod(shape) // axes.input_dim
        sizes = axes.input_dim, axes.output_dim
        return groups * math.prod(sizes) <= rows * sum(sizes)

    def call(self, inputs, training=None):
        inputs = ops.convert_to_tensor(inputs)  # On the device of the weights.
        if self._adds_delta:
            x = self._adapted_product(inputs, training)
        else:
            x = self._frozen_product(inputs)
        if self.activation is not None and not isinstance(x, tuple):
            x = self._activate(x, training)
        return x

    def quantized_call(self, *args, **kwargs):
        """What Keras calls in place of `call` if the kernel is quantized."""
        return self.call(*args, **kwargs)

    def _activate(self, x, training):
        # JAX would keep every intermediate of the activation for the backward
        # pass; recomputed from its input, they cost less than their storage.
        is_plain = self.activation is keras.activations.linear
        not_training = training is None or training is False
        if keras.config.backend() != "jax" or not_training or is_plain:
            return self.activation(x)
        return keras.remat(self.activation)(x)


class AdaptedDense(AdaptedLinear, keras.layers.Dense):
    """A `Dense` layer with an adapter of any factorization."""

    def _factor_axes(self, kernel_shape):
        return factors.dense_axes(kernel_shape)


class AdaptedEinsumDense(AdaptedLinear, keras.layers.EinsumDense):
    """An `EinsumDense` layer with an adapter of any factorization."""

    def _factor_axes(self, kernel_shape):
        return factors.einsum_axes(
            self.equation, kernel_shape, self.input_spec.ndim
        )
