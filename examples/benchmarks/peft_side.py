"""A PEFT contender: the same shapes in transformers, adapted by PEFT."""

import numpy as np
import peft
import torch
import transformers
from workloads import BUCKETS
from workloads import MAX_LENGTH

# More steps than any run has: ranks are chosen anew in all of them.
NEVER = 1_000_000
# The layers that KerasHub's contenders adapt, and the heads that train.
TARGETS = {
    "deberta": [
        "query_proj",
        "key_proj",
        "value_proj",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ],
    # As a regular expression: the pooler has a layer `dense`, too.
    "bert": r".*encoder\.layer\.\d+\..*(query|key|value|dense)",
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
HEADS = {
    "deberta": ["pooler", "classifier"],
    "bert": ["classifier"],
    "llama": None,
}


def build(workload, options):
    """Build and adapt a model; see `keras_side.build`."""
    adaptive = options.get("adaptive", False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = build_model(workload, device)
    model = peft.get_peft_model(model, peft_config(workload, adaptive))
    run = torch.compile(model) if options.get("compiled") else model
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.Adam(weights, 1e-4)
    batch = make_batch(workload)
    steps = 0

    def on_device():
        return {
            name: torch.from_numpy(a).to(device) for name, a in batch.items()
        }

    def train():
        nonlocal steps
        if not model.training:
            model.train()
        loss = run(**on_device()).loss
        loss.backward()
        optimizer.step()
        if adaptive:
            model.base_model.update_and_allocate(steps)
        optimizer.zero_grad()
        steps += 1
        return loss.item()

    def predict():
        if model.training:
            model.eval()
        inputs = on_device()
        del inputs["labels"]
        with torch.no_grad():
            return run(**inputs).logits.float().cpu().numpy()

    return {"train": train, "predict": predict}, sum(w.numel() for w in weights)


def build_model(workload, device):
    """Build the twin, on its device and in its dtype from the start."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, workload.dtype))
    try:
        with device:
            return twin(workload)
    finally:
        torch.set_default_dtype(before)


def twin(workload):
    shape = workload.shape
    config = {
        "vocab_size": shape["vocabulary_size"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "hidden_size": shape["hidden_dim"],
        "intermediate_size": shape["intermediate_dim"],
    }
    if workload.is_decoder:
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                num_key_value_heads=shape["num_heads"],
                max_position_embeddings=max(workload.length, MAX_LENGTH),
                use_cache=False,
                **config,
            )
        )
    config |= {"max_position_embeddings": MAX_LENGTH, "num_labels": 2}
    if workload.model == "bert":
        return transformers.BertForSequenceClassification(
            # KerasHub computes GELU by its tanh approximation.
            transformers.BertConfig(hidden_act="gelu_pytorch_tanh", **config)
        )
    return transformers.DebertaV2ForSequenceClassification(
        transformers.DebertaV2Config(
            relative_attention=True,
            position_buckets=BUCKETS,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            type_vocab_size=0,
            **config,
        )
    )


def peft_config(workload, adaptive):
    shared = {
        "target_modules": TARGETS[workload.model],
        "modules_to_save": HEADS[workload.model],
        "task_type": "CAUSAL_LM" if workload.is_decoder else "SEQ_CLS",
        "lora_alpha": workload.rank,
        "lora_dropout": 0.0,
    }
    if not adaptive:
        return peft.LoraConfig(r=workload.rank, **shared)
    return peft.AdaLoraConfig(
        init_r=workload.rank,
        target_r=workload.rank // 2,
        tinit=0,
        tfinal=NEVER // 2,
        deltaT=1,
        total_step=NEVER,
        **shared,
    )


def make_batch(workload):
    generator = np.random.default_rng(0)
    shape = (workload.batch, workload.length)
    tokens = generator.integers(0, workload.shape["vocabulary_size"], shape)
    batch = {"input_ids": tokens, "attention_mask": np.ones(shape, int)}
    if workload.model == "bert":
        batch["token_type_ids"] = np.zeros(shape, int)
    labels = generator.integers(0, 2, workload.batch)
    return {**batch, "labels": tokens if workload.is_decoder else labels}


def versions():
    return {m.__name__: m.__version__ for m in (torch, transformers, peft, np)}
