"""What PEFT computes on the Hugging Face twins of tiny KerasHub models.

`python peft_exchange_oracle.py make FOLDER` writes, for each twin, a base model
(from `FOLDER/<name>/from_keras.safetensors` if that is there), a LoRA and an
AdaLoRA adapter of random values, and `made.npz`, the logits of all three.

`python peft_exchange_oracle.py read FOLDER` reads the adapters that KerasHub
models exported beside them, and writes their logits to `read.npz`.

It runs in a process of its own, since a test run on one backend imports no
other. `peft_twins.py` says what the twins are.
"""

import pathlib
import sys

import numpy as np
import peft_twins


def randomize(model, generator):
    """Give all weights random values that are exact in float16."""
    import torch

    for name, parameter in model.named_parameters():
        value = generator.normal(0, 0.25, parameter.shape)
        if "norm" in name.lower() and name.endswith("weight"):
            value += 1
        # What RoBERTa has and KerasHub leaves out.
        if "roberta" in name and "token_type_embeddings" in name:
            value[:] = 0
        if "roberta" in name and "position_embeddings" in name:
            value[:2] = 0
        value = torch.from_numpy(np.asarray(value, "float16"))
        parameter.data.copy_(value)


def make_base(twin, folder):
    import safetensors.torch
    import transformers

    config_class, arguments = twin.config
    config = getattr(transformers, config_class)(
        pad_token_id=twin.padding, **_without(arguments, "pad_token_id")
    )
    model = getattr(transformers, twin.model)(config).eval()
    given = folder / "from_keras.safetensors"
    if given.is_file():
        # Strict: all of the model's weights, and no others.
        model.load_state_dict(safetensors.torch.load_file(given))
    else:
        randomize(model, np.random.default_rng(1))
    model.save_pretrained(folder / "base")


def _without(arguments, key):
    return {k: v for k, v in arguments.items() if k != key}


def base_of(twin, folder):
    import transformers

    model_class = getattr(transformers, twin.model)
    return model_class.from_pretrained(folder / "base").eval()


def logits_of(model, twin, adapters=()):
    """Logits at real tokens; with `adapters`, of all of them in one pass."""
    import torch

    ids, mask = peft_twins.inputs(twin.padding)
    tiled = np.tile((ids, mask), (1, max(1, len(adapters)), 1))
    options = {}
    if adapters:
        options["adapter_names"] = [name for name in adapters for _ in ids]
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(tiled[0]).long(),
            attention_mask=torch.from_numpy(tiled[1]).long(),
            **options,
        ).logits
    if adapters:
        logits = logits.reshape(len(adapters), len(ids), *logits.shape[1:])
        logits = logits.mean(dim=0)
    return peft_twins.of_tokens(logits.numpy(), mask)


def make_adapter(twin, folder, kind):
    """Write an adapter of random values; AdaLoRA's has a rank pattern."""
    import peft
    import torch

    task = "SEQ_CLS" if twin.is_classifier else "CAUSAL_LM"
    if kind == "lora":
        config = peft.LoraConfig(r=4, lora_alpha=6, task_type=task, **twin.lora)
    else:
        config = peft.AdaLoraConfig(
            init_r=4,
            target_r=2,
            total_step=10,
            lora_alpha=6,
            task_type=task,
            **twin.adalora,
        )
    model = peft.get_peft_model(base_of(twin, folder), config)
    generator = np.random.default_rng(2)
    pattern = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            value = generator.normal(0, 0.4, parameter.shape)
            parameter.data.copy_(torch.from_numpy(value))
        if "lora_E" in name:
            kept = [bool(kept) for kept in generator.integers(0, 2, 4)]
            # One module without any rank, one with all.
            kept = {0: [False] * 4, 1: [True] * 4}.get(len(pattern), kept)
            pattern[name.removeprefix("base_model.model.")] = kept
    if pattern:
        model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(folder / kind)


def adapted(twin, folder, *names):
    """The base with adapters loaded, the first of them active."""
    import peft

    first, *others = names
    model = peft.PeftModel.from_pretrained(
        base_of(twin, folder), folder / first, adapter_name=_short(first)
    )
    for name in others:
        model.load_adapter(folder / name, adapter_name=_short(name))
    return model.eval()


def _short(name):
    return name.replace("/", "_")


def make(folder):
    results = {}
    for twin in peft_twins.TWINS:
        own = folder / twin.name
        own.mkdir(exist_ok=True)
        make_base(twin, own)
        results[f"{twin.name}.base"] = logits_of(base_of(twin, own), twin)
        for kind in ("lora", "adalora"):
            make_adapter(twin, own, kind)
            logits = logits_of(adapted(twin, own, kind), twin)
            results[f"{twin.name}.{kind}"] = logits
    np.savez(folder / "made.npz", **results)


def read(folder):
    results = {}
    for twin in peft_twins.TWINS:
        own = folder / twin.name
        for kind in ("lora", "adalora"):
            export = f"our_{kind}"
            logits = logits_of(adapted(twin, own, export), twin)
            results[f"{twin.name}.{kind}"] = logits
            names = [
                f"{export}/instance_{n}" for n in range(peft_twins.INSTANCES)
            ]
            model = adapted(twin, own, *names)
            for n, name in enumerate(names):
                model.set_adapter(_short(name))
                results[f"{twin.name}.{kind}.{n}"] = logits_of(model, twin)
            if twin.in_one_pass:
                logits = logits_of(model, twin, [*map(_short, names)])
                results[f"{twin.name}.{kind}.in_one_pass"] = logits
    np.savez(folder / "read.npz", **results)


if __name__ == "__main__":
    {"make": make, "read": read}[sys.argv[1]](pathlib.Path(sys.argv[2]))
