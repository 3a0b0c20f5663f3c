"""What PEFT's DoRA computes and how it trains, for one linear layer.

Reads a case from standard input: kernel, factors, magnitude, input, target,
`r`, `lora_alpha`, learning rate and number of steps. Writes the output before
training and, after steps of SGD on the mean squared error, the tensors.
"""

import json
import sys


def main():
    import peft
    import torch

    case = json.load(sys.stdin)
    weight = torch.tensor(case["weight"])
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model = torch.nn.Sequential()
    model.add_module("layer", layer)
    layer.weight.data = weight
    config = peft.LoraConfig(
        r=case["r"],
        lora_alpha=case["lora_alpha"],
        target_modules=["layer"],
        use_dora=True,
    )
    wrapped = peft.get_peft_model(model, config)
    start = wrapped.state_dict()
    prefix = "base_model.model.layer."
    magnitude = f"{prefix}lora_magnitude_vector.default.weight"
    initial = start[magnitude].tolist()
    state = {
        f"{prefix}base_layer.weight": weight,
        f"{prefix}lora_A.default.weight": torch.tensor(case["a"]),
        f"{prefix}lora_B.default.weight": torch.tensor(case["b"]),
        magnitude: torch.tensor(case["magnitude"]),
    }
    wrapped.load_state_dict(state, strict=True)
    x, y = torch.tensor(case["inputs"]), torch.tensor(case["target"])
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=case["learning_rate"])
    output = wrapped(x).tolist()
    for _ in range(case["steps"]):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(wrapped(x), y).backward()
        optimizer.step()
    end = {
        name.removeprefix(prefix): value.tolist()
        for name, value in wrapped.state_dict().items()
    }
    json.dump({"initial": initial, "output": output, "end": end}, sys.stdout)


if __name__ == "__main__":
    main()
