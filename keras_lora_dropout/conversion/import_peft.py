"""`import_peft`: adapt a model as a PEFT adapter says, and load it."""

from keras_lora_dropout.conversion.enable import enable_lora_dropout
from keras_lora_dropout.conversion.import_plan import ImportPlan
from keras_lora_dropout.conversion.model import AdaptedModel

_FROM_FILE = (
    "rank",
    "alpha",
    "target_layers",
    "exclude_layers",
    "blocks",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "rank_budget",
    "init_lora_weights",
)


def import_peft(model, directory, **options):
    """Load a PEFT adapter into a KerasHub model, in place.

    A plain model is adapted with `enable_lora_dropout` on exactly the layers,
    and with the ranks and strengths, that the adapter has; its mean network
    then computes what PEFT does. Singular values of AdaLoRA are multiplied into
    `lora_kernel_b`. On a model that is adapted already, this is
    `model.import_peft(directory)`.

    The adapter is LoRA or AdaLoRA of the model's Hugging Face twin: BERT,
    RoBERTa, DeBERTaV3, Llama, Mistral, Gemma or Qwen2. A head among its
    `modules_to_save` is loaded, too.

    Args:
        model: A KerasHub task or backbone, plain or adapted.
        directory: Folder with `adapter_config.json` and
            `adapter_model.safetensors`.
        **options: For a plain model, arguments of `enable_lora_dropout`:
            `dropout_rate`, `num_samples`, `trainable_layers`, `mask_sharing`,
            `mask_sampling`, `rescale`, `sampling`, `seed`. The adapter itself
            says which layers are adapted, and with which rank and strength.

    Returns:
        The same `model` object.

    Raises:
        TypeError: If an option is not known.
        ValueError: If the files are damaged, hold what is not supported, or do
            not fit the model. All differences are named, and the model is
            unchanged.

    Example:

    >>> import keras_hub, tempfile
    >>> def backbone():
    ...     return keras_hub.models.BertBackbone(
    ...         vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=16,
    ...         intermediate_dim=32, max_sequence_length=8,
    ...     )
    >>> folder = tempfile.mkdtemp()
    >>> source = enable_lora_dropout(backbone(), target_layers="query")
    >>> source.export_peft(folder)
    >>> model = import_peft(backbone(), folder, num_samples=2, seed=0)
    >>> [path for path, layer in model.adapted_layers]
    ['transformer_layer_0/self_attention_layer/query']
    """
    if isinstance(model, AdaptedModel):
        if options:
            raise ValueError(
                f'Model "{model.name}" is adapted already, so that the options '
                f"{sorted(options)} come too late. Leave them out, or pass a "
                "plain model."
            )
        model.import_peft(directory)
        return model
    given = [name for name in _FROM_FILE if name in options]
    if given:
        raise ValueError(
            f"`import_peft` takes no {given}: the adapter says which layers "
            "have which rank and strength. For a model whose ranks adapt, call "
            "`enable_lora_dropout(model, rank_budget=...)` first, then "
            "`model.import_peft(directory)`."
        )
    plan = ImportPlan(model, directory)
    plan.check()
    enable_lora_dropout(
        model,
        rank=1,  # The true ranks come with the factors.
        target_layers=lambda path, layer: path in plan.modules,
        use_dora=plan.is_dora,
        **options,
    )
    plan.apply()
    return model
