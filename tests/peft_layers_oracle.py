"""What PEFT's LoRA computes for convolutions and embeddings.

Reads a list of cases from standard input: the class of the torch layer, its
arguments, `r`, `lora_alpha`, the tensors and the input. Writes a list of the
outputs, both as JSON.
"""

import json
import sys


def main():
    import peft
    import torch

    results = []
    for case in json.load(sys.stdin):
        layer = getattr(torch.nn, case["layer"])(*case["arguments"])
        model = torch.nn.Sequential()
        model.add_module("layer", layer)
        config = peft.LoraConfig(
            r=case["r"],
            lora_alpha=case["lora_alpha"],
            target_modules=["layer"],
        )
        wrapped = peft.get_peft_model(model, config)
        state = {
            f"base_model.model.layer.{name}": torch.tensor(value)
            for name, value in case["tensors"].items()
        }
        wrapped.load_state_dict(state, strict=True)
        with torch.no_grad():
            results.append(wrapped(torch.tensor(case["inputs"])).tolist())
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
