"""Names of the parts of Llama, Mistral, Qwen2 and Gemma.

Keys are paths of KerasHub layers, values are names of Hugging Face modules,
both without the number that stands for `{i}`.
"""

_LLAMA_BLOCK = {
    "self_attention_layernorm": "input_layernorm",
    "self_attention/query": "self_attn.q_proj",
    "self_attention/key": "self_attn.k_proj",
    "self_attention/value": "self_attn.v_proj",
    "self_attention/attention_output": "self_attn.o_proj",
    "feedforward_layernorm": "post_attention_layernorm",
    "feedforward_gate_dense": "mlp.gate_proj",
    "feedforward_intermediate_dense": "mlp.up_proj",
    "feedforward_output_dense": "mlp.down_proj",
}
_GEMMA_BLOCK = {
    "pre_attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/attention_output": "self_attn.o_proj",
    "pre_ffw_norm": "post_attention_layernorm",
    "ffw_gating": "mlp.gate_proj",
    "ffw_gating_2": "mlp.up_proj",
    "ffw_linear": "mlp.down_proj",
}


def _blocks(keras_block, block):
    return {
        f"{keras_block}_{{i}}/{path}": f"layers.{{i}}.{module}"
        for path, module in block.items()
    }


LLAMA = {
    "token_embedding": "embed_tokens",
    **_blocks("transformer_layer", _LLAMA_BLOCK),
    "sequence_output_layernorm": "norm",
}
MISTRAL = LLAMA
QWEN2 = LLAMA

GEMMA = {
    "token_embedding": "embed_tokens",
    **_blocks("decoder_block", _GEMMA_BLOCK),
    "final_normalization": "norm",
}
