"""`enable_lora_dropout`: select, check, rewrite, report."""

import logging
import math
import random

import keras

from keras_lora_dropout.conversion.converted_model import convert
from keras_lora_dropout.conversion.model import AdaptedModel
from keras_lora_dropout.conversion.model import SamplingSettings
from keras_lora_dropout.conversion.starting_factors import check_initialization
from keras_lora_dropout.conversion.starting_factors import starting_factors
from keras_lora_dropout.conversion.targets import layer_paths
from keras_lora_dropout.conversion.targets import select_targets
from keras_lora_dropout.conversion.targets import select_trainable
from keras_lora_dropout.conversion.targets import values_by_pattern
from keras_lora_dropout.conversion.trainable import count_entries
from keras_lora_dropout.conversion.trainable import freeze
from keras_lora_dropout.conversion.trainable import trainable_flags
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.rank_budget import check_rank_budget
from keras_lora_dropout.core.rank_budget import check_target
from keras_lora_dropout.core.sharding import check_built_here
from keras_lora_dropout.layers import adapt
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter

logger = logging.getLogger("keras_lora_dropout")


def enable_lora_dropout(
    model,
    *,
    rank=8,
    alpha=None,
    dropout_rate=0.5,
    num_samples=4,
    rank_budget=None,
    target_layers="all-linear",
    exclude_layers=None,
    blocks="all",
    rank_pattern=None,
    alpha_pattern=None,
    use_rslora=False,
    use_dora=False,
    init_lora_weights="he_uniform",
    trainable_layers="head",
    mask_sharing="batch",
    mask_sampling="bernoulli",
    rescale=False,
    sampling="parallel",
    optimize=True,
    seed=None,
):
    """Adapt a model with LoRA Dropout, in place.

    Linear layers get a LoRA adapter whose factors are masked by rows and
    columns in training; everything else is frozen but for the head. The model
    stays the same object and an instance of its own class. It gains
    `adapted_layers`, `ensemble_predict` and `ensemble_evaluate`, and its `fit`
    minimises the loss averaged over `num_samples` mask instances.

    Compile the model afterwards if its optimizer has already taken a step; an
    optimizer that has state is replaced by a new one of the same settings.
    What was adapted is logged (logger `keras_lora_dropout`, level `INFO`) and
    listed in `model.adapted_layers`.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 2-3
    (masks), Eq. 7 (training), Eq. 8 (ensemble).

    Args:
        model: A built `keras.Model`: any KerasHub task or backbone, or a
            functional, sequential or subclassed model.
        rank: Positive integer, at most the smaller side of each kernel.
            Defaults to 8.
        alpha: Positive number, from 1e-20 to 1e20, or `None`. Strength; `None`
            means `rank`, so that `scaling = alpha / rank` is 1.
        dropout_rate: Number in `[0, 1)`. Chance that a mask entry is zero; 0
            is plain LoRA. Defaults to 0.5.
        num_samples: Positive integer, at most 100,000. Mask instances N, in
            training and in ensembles. Defaults to 4.
        rank_budget: `RankBudget` or `None`. A budget selects AdaLoRA: adapters
            `P Lambda Q` that start with `initial_rank` (or `rank`) triplets
            each and are pruned to `target_rank` on average while `fit` runs.
            `None`: LoRA adapters of a fixed rank.
        target_layers: Which layers are adapted. `"all-linear"`: every `Dense`
            and `EinsumDense` in the backbone's blocks, never the output head.
            `"all-convolutions"`: every convolution of the backbone, likewise.
            Or a list of layer names (or path endings), a regular expression
            that is searched in the layer path, or a callable `(path, layer) ->
            bool`; these may also choose embeddings (`Embedding`,
            `ReversibleEmbedding`) and convolutions (`Conv1D`, `Conv2D`,
            `Conv3D`, `DepthwiseConv1D`, `DepthwiseConv2D`), and banks of
            experts in KerasHub's mixtures, which then have a factor pair and
            masks for each expert's kernels and need `sampling="sequential"`.
        exclude_layers: `None`, or a list, a regular expression or a callable
            as above: which of these layers are not adapted after all.
        blocks: Of which transformer blocks layers are adapted. `"all"`: of
            all, and beside them; `"first n"` or `"last n"`, as in `"last 4"`;
            or a list or range of indices, from 0, or from -1 downwards. What
            lies before the first adapted layer is computed once for all N
            instances.
        rank_pattern: `None`, or a dictionary of ranks for layers that get
            another one than `rank`. A key is a layer's name, the end of its
            path, or a regular expression for one of these; of several that
            match, the first counts. Not with a `rank_budget`.
        alpha_pattern: Likewise of strengths.
        use_rslora: Boolean. Whether `scaling` is `alpha / sqrt(rank)`, which
            keeps the strength of high ranks ([Kalajdzievski,
            2023](https://arxiv.org/abs/2312.03732)). It needs `alpha`. Layers
            hold it as `lora_alpha = alpha * sqrt(rank)`.
        use_dora: Boolean. Whether each output feature has a magnitude of its
            own, a weight that trains: the kernel plus the mean network's delta
            is divided by its column's norm and multiplied by it ([Liu et al.,
            2024](https://arxiv.org/abs/2402.09353), Eq. 5). On `Dense` and
            `EinsumDense` of floats; not with a `rank_budget`.
        init_lora_weights: Where the factors A and B start, under PEFT's names.
            The mean network starts at the base model with each of them.
            `"he_uniform"`: A is random, B is zero. `"gaussian"`: likewise, A
            of standard deviation `1 / rank`. `"orthogonal"`: both are random,
            in halves of one orthonormal basis, so that `A @ B` is zero; it
            needs a rank of 2 or more. `"pissa"`: the delta is the kernel's
            principal part, by its largest singular values ([Meng et al.,
            2024](https://arxiv.org/abs/2404.02948), Eq. 2-3), found by n
            iterations with `"pissa_niter_n"` (n from 1 to 999). `"olora"`: the
            first vectors of the kernel's QR decomposition ([Büyükakyüz,
            2024](https://arxiv.org/abs/2406.01775), Sec. 3). With these,
            layers subtract that start again, from frozen copies of it and
            unmasked. Masks then drop parts of the kernel itself, so choose
            low dropout rates. Not with a `rank_budget`.
        trainable_layers: What stays trainable besides the adapters. `"head"`:
            the layers outside the backbone (of a plain model, those that
            produce its outputs). `None`: nothing. Or names, a regular
            expression or a callable as above. All else is frozen, biases of
            adapted layers too.
        mask_sharing: `"batch"`: one mask per instance for the whole batch
            (the paper's Algorithm 1). `"example"`: each example draws its own
            masks, in each instance; with `num_samples=1` it costs one plain
            LoRA step.
        mask_sampling: `"bernoulli"`: the N instances are independent, as in
            the paper. `"balanced"`: each alone is drawn as before, but of the
            N, exactly `N * (1 - dropout_rate)`, rounded down or up, keep a
            mask entry, so that their mean varies less. With N = 1 both are
            the same.
        rescale: Boolean. Whether masks are divided by `1 - dropout_rate`.
            Defaults to `False`, as in the paper.
        sampling: `"parallel"`: the N instances run as one batch of `N * B`.
            `"sequential"`: one after another, in the memory of one.
        optimize: Boolean. Whether layers that KerasHub computes wastefully are
            computed in a lean form, with the same results up to rounding; at
            present the attention of DeBERTaV3, which halves a step's time.
        seed: Integer or `None`. Seed of factors and masks.

    Returns:
        The same `model` object.

    Raises:
        TypeError: If `model` is no `keras.Model`, or an argument has a type
            that is not listed.
        ValueError: If the model is not built or already adapted, if nothing
            matches `target_layers` or is left of it, if a pattern matches no
            adapted layer, if a selected layer is quantized to anything but
            int8 and int4, constrained, too small for its rank or carries
            Keras's own LoRA, if an argument is out of range, or if the model
            was built under another `keras.distribution` than that in force.
            The model is unchanged then.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((16,)),
    ...     keras.layers.Dense(32, activation="relu", name="hidden"),
    ...     keras.layers.Dense(2, name="head"),
    ... ])
    >>> model = enable_lora_dropout(model, rank=4, dropout_rate=0.5)
    >>> [path for path, layer in model.adapted_layers]
    ['hidden']
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`enable_lora_dropout` adapts a `keras.Model`, such as a KerasHub "
            f"task. Received: model={model!r} (of type {type(model).__name__})."
        )
    settings = SamplingSettings(
        num_samples, mask_sharing, sampling, mask_sampling
    )
    rank = _initial_rank(rank, rank_budget)
    kind = _kind(use_dora, rank_budget)
    adapter_settings = {
        "dropout_rate": validation.dropout_rate(dropout_rate),
        "rescale": validation.boolean("rescale", rescale),
    }
    check_initialization(init_lora_weights, rank_budget)
    validation.boolean("optimize", optimize)
    streams = random.Random(validation.seed(seed))
    _check_model(model)
    check_built_here(model)
    targets = select_targets(model, target_layers, exclude_layers, blocks)
    paths = [path for path, _ in targets]
    ranks = _ranks(rank, rank_pattern, rank_budget, paths)
    alphas = _alphas(alpha, alpha_pattern, use_rslora, ranks)
    for path, layer in targets:
        adapt.check_adaptable(layer, kind, ranks[path], f'layer "{path}"')
    trainable = select_trainable(model, trainable_layers)
    settings_of = {
        path: {
            "rank": ranks[path],
            "alpha": alphas[path],
            "seed": streams.randrange(validation.MAX_SEED),
            **adapter_settings,
        }
        for path in paths
    }
    starts = starting_factors(targets, settings_of, init_lora_weights)

    plain_trainable = trainable_flags(model)
    for path, layer in targets:
        adapt.adapt(layer, kind=kind, **settings_of[path])
        if path in starts:
            (a, b), initial = starts[path]
            values = a, *layer.factors[1:-1], b
            layer.replace_factors(values, alphas[path], initial)
    freeze(model, trainable)
    seed = streams.randrange(validation.MAX_SEED)
    convert(model, settings, seed, rank_budget, plain_trainable, optimize)
    _report(model)
    _warn_of_quantized(trainable)
    return model


def _kind(use_dora, rank_budget):
    """Which of `adapt.KINDS` the adapters are."""
    if not validation.boolean("use_dora", use_dora):
        return "LoRA" if rank_budget is None else "AdaLoRA"
    if rank_budget is not None:
        raise ValueError(
            "`use_dora` goes with a fixed rank, as in PEFT; a `rank_budget` "
            "selects AdaLoRA, which has singular values of its own. Received: "
            f"use_dora=True, rank_budget={rank_budget!r}. Leave one of them "
            "out."
        )
    return "DoRA"


def _initial_rank(rank, rank_budget):
    """The rank that every adapter starts with."""
    rank = validation.positive_integer("rank", rank)
    if check_rank_budget(rank_budget) is None:
        return rank
    rank = rank_budget.initial_rank or rank
    check_target(rank_budget.target_rank, rank)
    return rank


def _ranks(rank, rank_pattern, rank_budget, paths):
    """Return `{path: rank}` of the adapted layers."""
    if rank_pattern is not None and rank_budget is not None:
        raise ValueError(
            "`rank_pattern` goes with a fixed rank; a `rank_budget` chooses "
            f"the ranks itself. Received: rank_pattern={rank_pattern!r}, "
            f"rank_budget={rank_budget!r}. Leave one of them out."
        )
    own = values_by_pattern("rank_pattern", rank_pattern, paths)
    return {
        path: validation.positive_integer(f'rank_pattern["{path}"]', own[path])
        if path in own
        else rank
        for path in paths
    }


def _alphas(alpha, alpha_pattern, use_rslora, ranks):
    """Return `{path: alpha}`, with `scaling = alpha / rank`."""
    validation.boolean("use_rslora", use_rslora)
    validation.alpha(alpha, rank=1)  # A pattern may be for all layers.
    own = values_by_pattern("alpha_pattern", alpha_pattern, list(ranks))
    alphas = {}
    for path, rank in ranks.items():
        given = own.get(path, alpha)
        if use_rslora and given is None:
            raise ValueError(
                "`use_rslora=True` divides `alpha` by the square root of the "
                f"rank, so it needs one. Received: alpha={alpha!r} for layer "
                f'"{path}". Pass e.g. `alpha=16`.'
            )
        name = f'alpha_pattern["{path}"]' if path in own else "alpha"
        alphas[path] = validation.alpha(given, rank, name)
        if use_rslora:
            stretched = alphas[path] * math.sqrt(rank)
            alphas[path] = validation.alpha(stretched, rank, name)
    return alphas


def _check_model(model):
    if not model.built or not model.weights:
        raise ValueError(
            f'Model "{model.name}" is not built, so its layers have no kernels '
            "to adapt. Give it an `Input`, or call it on a batch of data, "
            "before `enable_lora_dropout`."
        )
    if not isinstance(model, AdaptedModel):
        owner = next(c for c in type(model).__mro__ if "train_step" in vars(c))
        if owner.__module__.partition(".")[0] != "keras":
            raise ValueError(
                f'Model "{model.name}" has a `train_step` of its own (in '
                f"{owner.__name__}), which the training on several mask "
                "instances would replace. Override `compute_loss` instead, or "
                "subclass `LoRADropoutModel` and call `super().train_step`."
            )
    for path, layer in layer_paths(model).items():
        if isinstance(layer, LoRADropoutAdapter):
            raise ValueError(
                f'LoRA Dropout is already enabled on model "{model.name}": '
                f'layer "{path}" has an adapter. It can be enabled once; start '
                "from a fresh model to change the settings."
            )


def _report(model):
    targets = model.adapted_layers
    logger.info(
        "LoRA Dropout adapts %d layers of model %r with %s weights; %s of %s "
        "weights train:\n%s",
        len(targets),
        model.name,
        f"{count_entries(f for _, lyr in targets for f in lyr.factors):,}",
        f"{count_entries(model.trainable_weights):,}",
        f"{model.count_params():,}",
        "\n".join(f"  {path}" for path, _ in targets),
    )


def _warn_of_quantized(trainable):
    """Warn of layers that are to train, but whose kernels are integers."""
    layers = {
        id(part): part
        for layer in trainable
        for part in [layer, *descendants(layer)]
        if not isinstance(part, LoRADropoutAdapter)
        and part.quantization_mode is not None
        and part.weights
    }
    if layers:
        logger.warning(
            "The kernels of %s are quantized and do not train, although these "
            "layers are no part of the adapters. Leave them out: "
            '`model.quantize("int8", filters=lambda layer: layer.name not in '
            "%r)`.",
            ", ".join(f'"{layer.path}"' for layer in layers.values()),
            [layer.name for layer in layers.values()],
        )
