"""Banks of experts with an adapter for each expert's kernels."""

from keras_lora_dropout.core.experts import ExpertAxes
from keras_lora_dropout.core.experts import expert_product
from keras_lora_dropout.layers import quantized
from keras_lora_dropout.layers.adapt import adapts_by
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter
from keras_lora_dropout.layers.lora_dropout import LoRAFactors
from keras_lora_dropout.layers.weights_in_order import WeightsInOrder


class AdaptedExperts(WeightsInOrder, LoRADropoutAdapter):
    """Mixin of a layer with kernels `(experts, in, out)`.

    It has one factor pair, and one pair of masks, for each expert and kernel.
    A subclass says how the layer computes (`bank_call`). All tokens of a batch
    are rows of one matrix, so that instances run one after another.
    """

    bank_call = None  # A function of the layer, its input and `product`.

    def call(self, hidden_states, training=None):
        pairs = [None] * len(quantized.kernel_weights(self))
        if self._adds_delta:
            factor_a, factor_b, keep = self._current_factors(training)
            if keep is not None:
                groups = keep[0].shape[0]
                self._check_groups(hidden_states, groups, batch_leads=False)
                factor_a = factor_a * keep[0][0][:, None]
                factor_b = factor_b * keep[1][0]
            pairs = self._axes.pairs(factor_a, factor_b)
        kernels = quantized.kernel_weights(self)

        def product(number, inputs):
            return expert_product(inputs, kernels[number], pairs[number])

        return type(self).bank_call(self, hidden_states, product)

    def _factor_axes(self, kernel_shape):
        weights = quantized.kernel_weights(self)
        return ExpertAxes(tuple(tuple(weight.shape) for weight in weights))


def adapts_experts(bank_class, kernel_names, forward):
    """Register how a bank of experts is adapted.

    Args:
        bank_class: Class of the layer.
        kernel_names: Attributes that hold its kernels `(experts, in, out)`.
        forward: Function `(layer, inputs, product)` that computes what the
            layer does, with `product(number, inputs)` in the place of the
            product by the kernel of that number.
    """
    quantized.KERNELS_OF[bank_class] = tuple(kernel_names)
    body = {"bank_call": staticmethod(forward), "__module__": __name__}
    base = type(f"Adapted{bank_class.__name__}", (AdaptedExperts,), body)
    adapts_by(LoRAFactors, {bank_class: base})
