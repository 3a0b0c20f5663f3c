"""Writes `docs/models.md` and the README's table from what the tests found.

    pytest tests/test_hub_models.py --junitxml=torch.xml
    python tests/write_models_page.py --torch torch.xml --jax jax.xml

A cell says "yes" if the tests of both backends passed, or names the backend
alone on which they did.
"""

import argparse
import collections
import pathlib
import re
import sys
import xml.etree.ElementTree

import hub_models
import keras_hub
from pages import markdown
from pages import replace_part
from test_hub_models import runs_in_sequence

import keras_lora_dropout as kld
from keras_lora_dropout.conversion.trainable import count_entries

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
COLUMNS = {
    "all adapted": "test_all_kernels_of_the_blocks_are_adapted",
    "trains": "test_training_reaches_all_adapters_and_nothing_frozen",
    "ensemble": "test_ensemble_is_the_mean_of_instances_that_differ",
    "in parallel": "test_parallel_instances_are_those_in_sequence",
    "files, merging": "test_adapters_survive_files_and_merging",
    "generates": "test_ensembles_generate",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for backend in "--torch", "--jax":
        parser.add_argument(
            backend, required=True, nargs="+", help="JUnit files"
        )
    options = parser.parse_args()
    passed = {
        "PyTorch": passed_tests(options.torch),
        "JAX": passed_tests(options.jax),
    }
    PAGE.write_text(page(passed), "utf-8")
    replace_part(ROOT / "README.md", "models", families_table())
    print(f"Written: {PAGE}")


def passed_tests(paths):
    """Return the pairs of test and task that passed in any of the files."""
    found = set()
    for path in paths:
        for case in xml.etree.ElementTree.parse(path).iter("testcase"):
            is_here = case.get("classname").endswith("test_hub_models")
            match = re.fullmatch(r"(\w+)\[(\w+)\]", case.get("name"))
            if is_here and match and not len(case):
                found.add(match.groups())
    if not found:
        sys.exit(f"{paths} have no test of a task that passed.")
    return found


def page(passed):
    heads = ["task", "adapters", "weights", *COLUMNS]
    rows = [
        [f"`{name}`", *adapters_of(name)]
        + [cell(name, column, test, passed) for column, test in COLUMNS.items()]
        for name in hub_models.tried_tasks()
    ]
    others = "\n".join(
        f"- `{name}`: {reason}."
        for name, reason in hub_models.NOT_TRIED.items()
    )
    return f"""# Models

What the tests found for the tasks of KerasHub {keras_hub.__version__}:
each is built in a tiny configuration, with adapters of rank 2 on all linear
layers of its blocks; where "convolutions" is said, on all convolutions of the
backbone (`target_layers="all-convolutions"`). `make test-all` runs them all on
JAX and PyTorch; this page is written from its results.

- *trains*: a step gives every adapter a gradient and changes nothing that is
  frozen.
- *ensemble*: the instances differ, and `ensemble_predict` is their mean.
- *in parallel*: the N instances as one batch give what they give one after
  another. "No": the layout of the model rules that out, and the error says so;
  pass `sampling="sequential"`.
- *files, merging*: adapters are saved, loaded into another instance of the
  model, and merged, with the same predictions.
- *generates*: `ensemble_generate`.

{markdown(heads, rows)}

SAM 3 needs torchvision on PyTorch, which the tests go without. SAM, SAM 3, Flux
and Stable Diffusion 3 refuse KerasHub's `fit`; they are trained by the method
of Keras, `keras.Model.train_on_batch(model, x, y)`. To fine-tune Stable
Diffusion 3 by flow matching, adapt the network that predicts velocities:
`enable_lora_dropout(task.backbone.diffuser)` has `fit` and `ensemble_predict`,
and `task.generate` uses it from then on. What the ensemble of a detector
decodes is the average of the instances' outputs.

The encoders of images and sound of Gemma 3n belong to its embedding and have no
adapters by `"all-linear"`; name their layers, with `sampling="sequential"`.

Kernels of experts, in mixtures, are adapted where they are
[named](api/enable_lora_dropout.md#experts), which is tested apart. The
feed-forward layers of Gemma 4 have no adapters: its blocks never call them.

Not among them:

{others}
"""


def adapters_of(name):
    target = hub_models.target_of(name)
    model = hub_models.build(name)
    kld.enable_lora_dropout(model, rank=2, target_layers=target)
    layers = [layer for _, layer in model.adapted_layers]
    count = count_entries(f for layer in layers for f in layer.factors)
    kind = "" if target == "all-linear" else " convolutions"
    return f"{len(layers)}{kind}", f"{count:,}"


def cell(name, column, test, passed):
    if column == "in parallel" and runs_in_sequence(name):
        return "no"
    if column == "generates":
        cls = hub_models.every_task()[name]
        if not issubclass(cls, hub_models.models.CausalLM):
            return ""
        if name.startswith("RWKV7"):
            return "with its preprocessor"
    backends = [b for b, found in passed.items() if (test, name) in found]
    if len(backends) == len(passed):
        return "yes"
    return ", ".join(backends) or "no"


def families_table():
    """Return the README's table of all tasks that are tried."""
    families = collections.defaultdict(list)
    for name in hub_models.tried_tasks():
        kind = next(kind for kind in KINDS if name.endswith(kind))
        family = name.removesuffix(kind)
        families[KINDS[kind]].append(family)
    rows = [[kind, ", ".join(names)] for kind, names in families.items()]
    return markdown(["KerasHub tasks", "families"], rows)


KINDS = {
    "TextClassifier": "text classifiers",
    "ProteinClassifier": "text classifiers",
    "MaskedLM": "masked language models",
    "MaskedPLM": "masked language models",
    "Seq2SeqLM": "encoders and decoders",
    "CausalLM": "causal language models",
    "TextEmbedder": "text embedders",
    "ImageClassifier": "image classifiers",
    "ImageSegmenter": "image segmenters",
    "ObjectDetector": "object detectors",
    "DepthEstimator": "depth estimators",
    "TextToImage": "text to image",
    "ImageToImage": "image to image",
    "Inpaint": "inpainting",
    "AudioToText": "speech to text",
}


if __name__ == "__main__":
    main()
