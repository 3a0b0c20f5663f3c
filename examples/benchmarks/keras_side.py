"""A Keras contender: KerasHub's own LoRA, or ours."""

import importlib

import keras
import keras_hub
import numpy as np
from workloads import BUCKETS
from workloads import MAX_LENGTH

import keras_lora_dropout as kld

ATTENTION = ["query", "key", "value", "attention_output"]
FEED_FORWARD = [
    "feedforward_intermediate_dense",
    "feedforward_output_dense",
]
# More steps than any run has: ranks are chosen anew in all of them.
NEVER = 1_000_000


def build(workload, options):
    """Build and adapt a model.

    Args:
        workload: A `Workload`.
        options: Those of an `Entry`.

    Returns:
        Dict from the name of an action to a function that does it and waits
        for its result; and the number of weights that train.
    """
    model = compiled_model(workload, options)
    x, y = make_batch(workload)
    size = workload.batch

    def predict():
        model.predict(x, batch_size=size, verbose=0)

    def four_predicts():
        for _ in range(4):
            predict()

    def ensemble_predict():
        model.ensemble_predict(x, batch_size=size, num_samples=4, verbose=0)

    actions = {
        # It returns the loss as a number: it waits for the step.
        "train": lambda: model.train_on_batch(x, y),
        "predict": predict,
        "four_predicts": four_predicts,
        "ensemble_predict": ensemble_predict,
    }
    return actions, sum(np.prod(w.shape) for w in model.trainable_weights)


def compiled_model(workload, options):
    """Build a model, adapt it by the options of an `Entry`, and compile it."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(workload.dtype)
    model = build_model(workload)
    if options is None:
        targets = target_names(workload)
        model.backbone.enable_lora(workload.rank, target_layer_names=targets)
    else:
        enable_ours(model, workload, **options)
    # KerasHub adds a metric of its own unless it is told not to.
    metrics = "weighted_metrics" if workload.is_decoder else "metrics"
    model.compile(
        keras.optimizers.Adam(1e-4),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **{metrics: []},
    )
    return model


def build_model(workload):
    models = keras_hub.models
    shape = dict(workload.shape)
    if workload.model == "llama":
        heads = shape.pop("num_heads")
        key_value_heads = shape.pop("num_key_value_heads", heads)
        backbone = models.LlamaBackbone(
            num_query_heads=heads, num_key_value_heads=key_value_heads, **shape
        )
        return models.LlamaCausalLM(backbone=backbone)
    shape["max_sequence_length"] = MAX_LENGTH
    if workload.model == "bert":
        backbone = models.BertBackbone(**shape)
        return models.BertTextClassifier(backbone=backbone, num_classes=2)
    backbone = models.DebertaV3Backbone(bucket_size=BUCKETS, **shape)
    return models.DebertaV3TextClassifier(backbone=backbone, num_classes=2)


def target_names(workload):
    return ATTENTION if workload.is_decoder else ATTENTION + FEED_FORWARD


def enable_ours(
    model,
    workload,
    adaptive=False,
    top_third=False,
    hidden_key=None,
    **options,
):
    if adaptive:
        options["rank_budget"] = kld.RankBudget(
            workload.rank // 2, warmup_steps=0, total_steps=NEVER
        )
    targets = target_names(workload)
    if top_third:
        targets = top_third_of(model.backbone, workload, targets)

    kld.enable_lora_dropout(
        model, rank=workload.rank, target_layers=targets, **options
    )
    if hidden_key is not None:
        kld.enable_transformer_dropout(model, **kld.hidden_key(**hidden_key))


def top_third_of(backbone, workload, names):
    """Return a selector of the named layers in the topmost third."""
    blocks = [backbone.transformer_layers[i] for i in workload.top_third]
    starts = tuple(f"{block.name}/" for block in blocks)
    return lambda path, layer: path.startswith(starts) and layer.name in names


def make_batch(workload):
    generator = np.random.default_rng(0)
    shape = (workload.batch, workload.length)
    tokens = generator.integers(0, workload.shape["vocabulary_size"], shape)
    x = {"token_ids": tokens, "padding_mask": np.ones(shape, bool)}
    if workload.model == "bert":
        x["segment_ids"] = np.zeros(shape, int)
    if workload.is_decoder:
        return x, tokens
    return x, generator.integers(0, 2, workload.batch)


def versions():
    backend = importlib.import_module(keras.config.backend())
    modules = (backend, keras, keras_hub, kld, np)
    return {module.__name__: module.__version__ for module in modules}
