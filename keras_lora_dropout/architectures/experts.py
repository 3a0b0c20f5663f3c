"""The banks of experts of KerasHub's mixtures, and how each one computes.

Their kernels are weights of one layer, which multiplies by them in its `call`;
so an adapter on them has to do what that `call` does. KerasHub exports none of
these classes. A `call` that is not the one that was read here is not adapted.
"""

import hashlib
import importlib
import inspect
import logging

from keras import ops

from keras_lora_dropout.layers.experts import adapts_experts

logger = logging.getLogger("keras_lora_dropout")

_MODELS = "keras_hub.src.models."
_GATE = "_expert_feedforward_gate_dense"
_INTERMEDIATE = "_expert_feedforward_intermediate_dense"
_OUTPUT = "_expert_feedforward_output_dense"


def _mixtral(layer, inputs, product):
    gate = layer.activation(ops.cast(product(0, inputs), "float32"))
    gate = ops.cast(gate, layer.compute_dtype)
    return product(2, product(1, inputs) * gate)


def _qwen(layer, inputs, product):
    gate, up = ops.split(product(0, inputs), 2, axis=-1)
    return product(1, up * layer.activation(gate))


def _qwen_3_5(layer, inputs, product):
    gate, up = ops.split(product(0, inputs), 2, axis=-1)
    gate = ops.silu(ops.cast(gate, "float32"))
    return product(1, up * ops.cast(gate, inputs.dtype))


def _gpt_oss(layer, inputs, product):
    gate_up = product(0, inputs) + layer.gate_up_proj_bias[:, None, :]
    gate = ops.clip(gate_up[..., ::2], -1e9, layer.limit)
    up = ops.clip(gate_up[..., 1::2], -layer.limit, layer.limit)
    glu = gate * ops.sigmoid(gate * layer.alpha)
    return product(1, (up + 1) * glu) + layer.down_proj_bias[:, None, :]


# SHA-256 of the source of `call`.
_QWEN_CALL = "bd02f652fa8e682e236235a0da5f59d764387d1af6987af40528f4b9a653005e"
_MIXTRAL_CALL = (
    "2270b243f7b54a4e2a12907b3073e8958007f5c5bd66f70be669313457750ee4"
)
_QWEN_3_5_CALL = (
    "b18c1a66189998fd92b89613057d302951267db25da752980aceebd63d02713a"
)
_GPT_OSS_CALL = (
    "fb24f587d6bcd2f9b503d3f03adb59ce6cc64ba6a8a904140baeba0a9b7aac4f"
)
# Module and class of the bank -> its `call`, its kernels, how it computes.
_BANKS = {
    ("mixtral.mixtral_decoder", "MixtralMoeExperts"): (
        _MIXTRAL_CALL,
        (_GATE, _INTERMEDIATE, _OUTPUT),
        _mixtral,
    ),
    ("qwen_moe.qwen_moe_decoder", "QwenMoeExperts"): (
        _QWEN_CALL,
        (_GATE, _OUTPUT),
        _qwen,
    ),
    ("qwen3_moe.qwen3_moe_decoder", "Qwen3MoeExperts"): (
        _QWEN_CALL,
        (_GATE, _OUTPUT),
        _qwen,
    ),
    ("qwen3_5_moe.qwen3_5_moe_decoder", "Qwen3_5MoeExperts"): (
        _QWEN_3_5_CALL,
        (_GATE, _OUTPUT),
        _qwen_3_5,
    ),
    ("gpt_oss.gpt_oss_decoder", "GptOssExperts"): (
        _GPT_OSS_CALL,
        ("gate_up_proj", "down_proj"),
        _gpt_oss,
    ),
}


def register():
    """Make the banks of the installed KerasHub known to `layers.adapt`."""
    for (module, name), (digest, kernels, forward) in _BANKS.items():
        try:
            bank = getattr(importlib.import_module(_MODELS + module), name)
        except (ImportError, AttributeError):
            continue  # Another KerasHub has it elsewhere.
        source = inspect.getsource(bank.call)
        if hashlib.sha256(source.encode()).hexdigest() != digest:
            logger.debug("%s computes anew and is not adapted.", name)
            continue
        adapts_experts(bank, kernels, forward)
