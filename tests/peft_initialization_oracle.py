"""What PEFT makes of its `init_lora_weights`, written to an `.npz`.

`python peft_initialization_oracle.py FOLDER` reads the kernels and the data of
`FOLDER/given.npz`, in Keras orientation, and writes `FOLDER/found.npz`:

- of each of `CASES`, a small network adapted by PEFT: its factors and outputs
  at the start, and after each of some steps of plain SGD on all factors;
- how widely random factors are spread;
- the logits of the Hugging Face twins in `TWINS` with what KerasHub models
  exported beside them.
"""

import pathlib
import sys

import numpy as np

LAYERS = ("first", "second")
RATE, STEPS = 0.1, 4
# By name: arguments of `LoraConfig`.
CASES = {
    "pissa": {"init_lora_weights": "pissa", "r": 2, "lora_alpha": 3},
    "pissa, rslora": {
        "init_lora_weights": "pissa",
        "r": 3,
        "lora_alpha": 2,
        "use_rslora": True,
    },
    "pissa, fast": {
        # Without spare vectors, PEFT's takes so many to be exact.
        "init_lora_weights": "pissa_niter_99",
        "r": 2,
        "lora_alpha": 3,
    },
    "olora": {"init_lora_weights": "olora", "r": 2, "lora_alpha": 3},
    "olora, one": {"init_lora_weights": "olora", "r": 1, "lora_alpha": 1},
}
SPREAD, SPREAD_RANK = (600, 500), 10
TWINS = ("deberta_v3", "llama")
INSTANCES = 2


def network(given):
    """Two layers with an activation and a head, of given kernels."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in (*LAYERS, "head"):
                kernel = torch.from_numpy(given[f"{name}.kernel"].T.copy())
                layer = torch.nn.Linear(*reversed(kernel.shape))
                layer.weight.data.copy_(kernel)
                layer.bias.data.copy_(torch.from_numpy(given[f"{name}.bias"]))
                self.add_module(name, layer)

        def forward(self, x):
            x = torch.tanh(self.first(x))
            return self.head(torch.tanh(self.second(x)))

    return Network()


def train(given, options):
    import peft
    import torch

    config = peft.LoraConfig(target_modules=list(LAYERS), **options)
    model = peft.get_peft_model(network(given), config)
    x, y = (torch.from_numpy(given[name]) for name in "xy")
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(factors, RATE)
    found, outputs = {}, []

    def record(when):
        for name in LAYERS:
            layer = getattr(model.base_model.model, name)
            for letter, part in (("a", layer.lora_A), ("b", layer.lora_B)):
                value = part["default"].weight.detach().numpy().T.copy()
                found[f"{name}.{letter}.{when}"] = value

    record("start")
    for _ in range(STEPS + 1):
        output = model(x)
        outputs.append(output.detach().numpy().copy())
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(output, y).backward()
        if len(outputs) <= STEPS:
            optimizer.step()
    record("end")
    return {**found, "outputs": outputs}


def spread(init):
    """Standard deviations of the factors of a wide layer, as PEFT has them."""
    import peft
    import torch

    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(*SPREAD))
    model = peft.get_peft_model(
        plain,
        peft.LoraConfig(
            init_lora_weights=init, r=SPREAD_RANK, target_modules=["0"]
        ),
    )
    layer = model.base_model.model[0]
    return [
        part["default"].weight.std().item()
        for part in (layer.lora_A, layer.lora_B)
    ]


def exports(folder):
    import peft_exchange_oracle as exchange
    import peft_twins

    found = {}
    for twin in peft_twins.TWINS:
        if twin.name not in TWINS:
            continue
        own = folder / twin.name
        exchange.make_base(twin, own)
        base = exchange.base_of(twin, own)
        found[f"{twin.name}.base"] = exchange.logits_of(base, twin)
        names = ["export", *(f"export/instance_{n}" for n in range(INSTANCES))]
        for name in names:
            model = exchange.adapted(twin, own, name)
            logits = exchange.logits_of(model, twin)
            found[f"{twin.name}.{name}"] = logits
    return found


def main(folder):
    with np.load(folder / "given.npz", allow_pickle=False) as given:
        given = dict(given)
    found = {
        f"{case}.{name}": np.asarray(value)
        for case, options in CASES.items()
        for name, value in train(given, options).items()
    }
    for init in ("gaussian", "orthogonal"):
        found[f"spread.{init}"] = np.asarray(spread(init))
    np.savez(folder / "found.npz", **found, **exports(folder))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
