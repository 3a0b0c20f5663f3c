"""What ranks and scalings PEFT gives the layers of a tiny BERT.

Reads a list of arguments of `LoraConfig` from standard input, and writes for
each `{module: [rank, scaling]}`, both as JSON.
"""

import json
import sys


def main():
    import peft
    import transformers

    results = []
    for options in json.load(sys.stdin):
        config = transformers.BertConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
        )
        model = transformers.BertModel(config)
        peft.get_peft_model(model, peft.LoraConfig(**options))
        results.append(
            {
                name: [module.r["default"], module.scaling["default"]]
                for name, module in model.named_modules()
                if isinstance(module, peft.tuners.lora.LoraLayer)
            }
        )
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
