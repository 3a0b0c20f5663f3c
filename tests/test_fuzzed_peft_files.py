"""Whatever is in a PEFT adapter's files, it is read rightly or refused."""

import json
import math
import re

import fuzzed_files
import fuzzed_models
import fuzzing
import numpy as np
import pytest
from helpers import array
from helpers import randomize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.numpy import save_file

import keras_lora_dropout as kld
from keras_lora_dropout.architectures.huggingface.twin import HuggingFaceTwin

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "adalora": {"rank_budget": kld.RankBudget(1)},
}

pytestmark = fuzzing.ONE_BACKEND


class Reader:
    """A model that imports changed files, again and again."""

    def __init__(self, kind, folder):
        self.options, self.folder = KINDS[kind], folder
        self.works = self.refused = 0
        self.renew()
        self.model.export_peft(folder)
        self.config = json.loads((folder / CONFIG).read_text())
        self.tensors = load_file(folder / TENSORS)
        self.files = {p.name: p.read_bytes() for p in folder.iterdir()}
        twin = HuggingFaceTwin(self.model)
        self.modules = {path: twin.modules[path] for path in twin.modules}
        self.renew()

    def renew(self):
        plain = fuzzed_models.bert()
        model = kld.enable_lora_dropout(plain, rank=2, seed=0, **self.options)
        self.model = randomize(model, seed=9)
        self.before = fuzzing.state_of(self.model)

    def read(self, **files):
        for name, content in {**self.files, **files}.items():
            (self.folder / name).write_bytes(content)
        try:
            self.model.import_peft(self.folder)
        except ValueError as error:
            assert str(self.folder) in str(error)
            self.refused += 1
            after = fuzzing.state_of(self.model)
            fuzzing.assert_same_state(after, self.before)
        else:
            self.works += 1
            self._check()
            self.renew()

    def _check(self):
        """The mean network's delta is what PEFT makes of the same files."""
        config = json.loads((self.folder / CONFIG).read_text())
        tensors = load_file(self.folder / TENSORS)
        for path, layer in self.model.adapted_layers:
            with np.errstate(invalid="ignore", over="ignore"):
                expected = peft_delta(config, tensors, self.modules[path])
                delta = array(layer.lora_kernel_a) @ factor_b(layer)
                delta = delta * array(layer.mean_scale)
            if not np.isfinite(expected).all():
                assert not np.isfinite(delta).all()  # So it is in the file.
                continue
            error = np.abs(delta - expected.T)
            assert (error <= 1e-5 * np.abs(expected).max()).all()
        tokens = np.array([[1, 1, 0]])
        inputs = {name: tokens for name in self.model.input}
        self.model(inputs, training=True)
        self.model.save_adapters(self.folder.parent / "again")


def factor_b(layer):
    b = array(layer.lora_kernel_b)
    if layer.kind == "AdaLoRA":
        b = array(layer.lora_lambda)[:, None] * b
    return b


def peft_delta(config, tensors, module):
    """`scaling * B @ A` of one module, as PEFT's code computes it."""
    name = f"base_model.model.{module}"
    is_adaptive = config["peft_type"] == "ADALORA"
    ending = "" if is_adaptive else ".weight"
    a, b = (
        tensors[f"{name}.lora_{factor}{ending}"].astype("float64")
        for factor in "AB"
    )
    if is_adaptive:
        e = tensors[f"{name}.lora_E"].astype("float64")
        rank = config.get("init_r", 12)
        alpha = config.get("lora_alpha", 8)
        alpha = alpha if alpha > 0 else rank
        return (alpha / (rank + 1e-5)) * b @ (e * a)
    alpha = matching(config.get("alpha_pattern"), module)
    alpha = config.get("lora_alpha", 8) if alpha is None else alpha
    rank = len(a)
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return (alpha / divisor) * b @ a


def matching(pattern, module):
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return None


@pytest.fixture(params=KINDS)
def reader(request, tmp_path, fuzzed_cases):
    reader = Reader(request.param, tmp_path / "adapter")
    yield reader
    fuzzed_cases.update(works=reader.works, refused=reader.refused)


FIELDS = fuzzing.one_of(
    *("peft_type", "r", "init_r", "lora_alpha", "rank_pattern", "use_dora"),
    *("alpha_pattern", "use_rslora", "bias", "init_lora_weights", "lora_bias"),
    *("fan_in_fan_out", "modules_to_save", "target_modules", "layers_pattern"),
    *("layer_replication", "trainable_token_indices", "lora_dropout"),
)


def test_any_field_of_the_configuration(reader):
    @fuzzing.cases(60)
    @given(st.data())
    def change(data):
        config = fuzzed_files.changed_json(data.draw, reader.config)
        if data.draw(st.booleans()):
            name = data.draw(FIELDS)
            config[name] = data.draw(fuzzed_files.ODD_JSON)
        if data.draw(st.booleans()):
            name = data.draw(fuzzing.one_of("rank_pattern", "alpha_pattern"))
            key = data.draw(fuzzing.one_of("query", ".*", "(", "q.*y", "é"))
            config[name] = {key: data.draw(fuzzed_files.ODD_JSON)}
        reader.read(**{CONFIG: json.dumps(config).encode()})

    change()
    assert reader.works
    assert reader.refused


def test_any_text_in_the_configuration(reader):
    @fuzzing.cases(20)
    @given(st.data())
    def change(data):
        text = fuzzed_files.changed_text(data.draw, reader.config)
        reader.read(**{CONFIG: text.encode()})

    change()
    assert reader.refused


def test_any_tensor(reader):
    @fuzzing.cases(40)
    @given(st.data())
    def change(data):
        tensors = fuzzed_files.changed_tensors(data.draw, reader.tensors)
        path = reader.folder.parent / TENSORS
        try:
            save_file(tensors, path)
        except Exception:  # Nothing that such files can hold.
            return
        reader.read(**{TENSORS: path.read_bytes()})

    change()
    assert reader.works
    assert reader.refused


def test_any_bytes(reader):
    @fuzzing.cases(40)
    @given(st.data())
    def change(data):
        name = data.draw(st.sampled_from(sorted(reader.files)))
        content = reader.files[name]
        reader.read(**{name: fuzzed_files.changed_bytes(data.draw, content)})

    change()
    assert reader.refused
