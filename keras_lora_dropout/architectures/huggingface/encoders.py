"""Names of the parts of BERT, RoBERTa and DeBERTaV3.

Keys are paths of KerasHub layers, values are names of Hugging Face modules,
both without the number that stands for `{i}`. KerasHub's `feedforward_*`
layers stand directly in the block; its feed-forward dense layers are two
modules (`intermediate` and `output`) at Hugging Face.
"""

_BERT_BLOCK = {
    "self_attention_layer/query": "attention.self.query",
    "self_attention_layer/key": "attention.self.key",
    "self_attention_layer/value": "attention.self.value",
    "self_attention_layer/attention_output": "attention.output.dense",
    "self_attention_layer_norm": "attention.output.LayerNorm",
    "feedforward_intermediate_dense": "intermediate.dense",
    "feedforward_output_dense": "output.dense",
    "feedforward_layer_norm": "output.LayerNorm",
}
# The parts of attention have other names than BERT's.
_DEBERTA_BLOCK = {
    **_BERT_BLOCK,
    "self_attention_layer/query": "attention.self.query_proj",
    "self_attention_layer/key": "attention.self.key_proj",
    "self_attention_layer/value": "attention.self.value_proj",
}


def _blocks(keras_block, block):
    return {
        f"{keras_block}_{{i}}/{path}": f"encoder.layer.{{i}}.{module}"
        for path, module in block.items()
    }


BERT = {
    "token_embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "segment_embedding": "embeddings.token_type_embeddings",
    "embeddings_layer_norm": "embeddings.LayerNorm",
    **_blocks("transformer_layer", _BERT_BLOCK),
    "pooled_dense": "pooler.dense",
}
BERT_HEAD = {"logits": "classifier"}

ROBERTA = {
    "embeddings/token_embedding": "embeddings.word_embeddings",
    "embeddings/position_embedding": "embeddings.position_embeddings",
    "embeddings_layer_norm": "embeddings.LayerNorm",
    **_blocks("transformer_layer", _BERT_BLOCK),
}
ROBERTA_HEAD = {
    "pooled_dense": "classifier.dense",
    "logits": "classifier.out_proj",
}

DEBERTA_V3 = {
    "token_embedding": "embeddings.word_embeddings",
    "embeddings_layer_norm": "embeddings.LayerNorm",
    "rel_embedding": "encoder.rel_embeddings",
    "rel_embedding/rel_embeddings_layer_norm": "encoder.LayerNorm",
    **_blocks("disentangled_attention_encoder_layer", _DEBERTA_BLOCK),
}
DEBERTA_V3_HEAD = {"pooled_dense": "pooler.dense", "logits": "classifier"}
