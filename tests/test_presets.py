"""KerasHub presets of adapted models."""

import os
import subprocess
import sys

import families
import keras
import numpy as np
import pytest
from families import FAMILIES
from helpers import array
from helpers import randomize
from keras_hub import models

import keras_lora_dropout as kld

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def adapted(family, **options):
    model = kld.enable_lora_dropout(
        family(), **{"rank": 2, "num_samples": 2, "seed": 0, **options}
    )
    return randomize(model, scale=0.5)


def both(model, x):
    return (
        model.predict(x, verbose=0),
        model.ensemble_predict(x, seed=3, verbose=0),
    )


@pytest.mark.parametrize("case", FAMILIES, ids=lambda f: f[0].__name__)
def test_from_preset_gives_the_adapted_model(case, tmp_path):
    family = case[0]
    model, (x, _) = adapted(family), families.data_of(family)
    model.save_to_preset(tmp_path / "preset")
    plain = model.plain_class()
    for cls in (plain, plain.__mro__[1], type(model)):
        loaded = cls.from_preset(str(tmp_path / "preset"))
        assert type(loaded) is type(model)
        assert loaded.lora_dropout == model.lora_dropout
        np.testing.assert_array_equal(both(loaded, x), both(model, x))
        assert [v.trainable for v in loaded.weights] == [
            v.trainable for v in model.weights
        ]
    assert os.listdir(tmp_path) == ["preset"]


def test_ranks_are_in_it(tmp_path):
    model = adapted(families.llama, rank_budget=kld.RankBudget(1))
    for _, layer in model.adapted_layers:
        layer.lora_lambda.assign([0.5, 0.7])
    model.save_to_preset(str(tmp_path / "open"))
    loaded = models.CausalLM.from_preset(str(tmp_path / "open"))
    assert loaded.rank_budget == model.rank_budget
    assert loaded.rank_allocator.is_open
    np.testing.assert_array_equal(
        both(loaded, families.TEXTS), both(model, families.TEXTS)
    )
    mask = array(model.rank_allocator.rank_mask)
    mask[::2] = 0
    model.rank_allocator.rank_mask.assign(mask)
    model.compact_ranks()
    model.save_to_preset(str(tmp_path / "compact"))
    loaded = models.CausalLM.from_preset(str(tmp_path / "compact"))
    assert loaded.rank_pattern() == model.rank_pattern()
    np.testing.assert_array_equal(
        both(loaded, families.TEXTS), both(model, families.TEXTS)
    )


def test_options_of_from_preset(tmp_path):
    """A new head and another precision, as for any preset."""
    model = adapted(families.bert)
    model.save_to_preset(str(tmp_path / "preset"))
    load = models.TextClassifier.from_preset
    loaded = load(str(tmp_path / "preset"), num_classes=5)
    assert loaded.predict(families.TEXTS, verbose=0).shape == (6, 5)
    for (_, ours), (_, theirs) in zip(
        model.adapted_layers, loaded.adapted_layers, strict=True
    ):
        for factor, other in zip(ours.factors, theirs.factors, strict=True):
            np.testing.assert_array_equal(array(factor), array(other))
    loaded = load(str(tmp_path / "preset"), dtype="bfloat16")
    assert loaded.adapted_layers[0][1]._kernel.dtype == "bfloat16"
    assert loaded.adapted_layers[0][1].lora_kernel_a.dtype == "float32"


def test_backbones(tmp_path):
    model = adapted(lambda: families.bert().backbone)
    x = families.bert().preprocessor(families.TEXTS)
    expected = model.predict(x, verbose=0)
    model.save_to_preset(str(tmp_path / "preset"))
    loaded = models.BertBackbone.from_preset(str(tmp_path / "preset"))
    assert type(loaded) is type(model)
    found = loaded.predict(x, verbose=0)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_plain_class_does_not_lose_adapters_silently(tmp_path):
    model = adapted(families.bert)
    model.save_to_preset(str(tmp_path / "preset"))
    with pytest.raises(ValueError, match="expected 2 variables"):
        models.BertBackbone.from_preset(str(tmp_path / "preset"))


def test_plain_presets_stay_plain(tmp_path):
    """KerasHub finds its own classes among those that are registered."""
    plain = families.bert()
    plain.save_to_preset(str(tmp_path / "preset"))
    adapted(families.bert)
    for cls in (models.TextClassifier, models.BertTextClassifier):
        loaded = cls.from_preset(str(tmp_path / "preset"))
        assert type(loaded) is models.BertTextClassifier
    # Another task on the same backbone.
    loaded = models.MaskedLM.from_preset(str(tmp_path / "preset"))
    assert type(loaded) is models.BertMaskedLM


def test_a_merged_model_is_an_ordinary_preset(tmp_path):
    model = adapted(families.deberta).merge_adapters()
    expected = model.predict(families.TEXTS, verbose=0)
    model.save_to_preset(str(tmp_path / "preset"))
    code = (
        "import sys, numpy as np, keras_hub, families\n"
        "cls = keras_hub.models.DebertaV3TextClassifier\n"
        "model = cls.from_preset(sys.argv[1])\n"
        "assert type(model) is cls\n"
        "assert 'keras_lora_dropout' not in sys.modules\n"
        "np.save(sys.argv[2], model.predict(families.TEXTS, verbose=0))\n"
    )
    preset, found = tmp_path / "preset", tmp_path / "found.npy"
    process = subprocess.run(
        [sys.executable, "-c", code, preset, found],
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    np.testing.assert_array_equal(np.load(found), expected)


def test_an_unknown_class_is_merged_and_said(tmp_path, caplog):
    class OwnClassifier(models.BertTextClassifier):
        """A task that KerasHub does not ship."""

    plain = families.bert()
    model = OwnClassifier(plain.backbone, 2, preprocessor=plain.preprocessor)
    randomize(kld.enable_lora_dropout(model, rank=2, seed=0), scale=0.5)
    expected = model.predict(families.TEXTS, verbose=0)
    # Registered for good, it would be one of KerasHub's own to other tests.
    with keras.saving.custom_object_scope({"OwnClassifier": OwnClassifier}):
        model.save_to_preset(str(tmp_path / "preset"))
        assert "merged plain model" in caplog.text
        loaded = OwnClassifier.from_preset(str(tmp_path / "preset"))
    assert type(loaded) is OwnClassifier
    np.testing.assert_allclose(
        loaded.predict(families.TEXTS, verbose=0), expected, atol=1e-6
    )
    np.testing.assert_array_equal(
        model.predict(families.TEXTS, verbose=0), expected
    )


def test_other_adapters_stay_out_and_it_is_said(tmp_path, caplog):
    model = adapted(families.bert)
    model.add_adapter("second", rank=1)
    model.save_to_preset(str(tmp_path / "preset"))
    assert "['second']" in caplog.text
    assert model.adapter_names == ["default", "second"]
    loaded = models.TextClassifier.from_preset(str(tmp_path / "preset"))
    assert loaded.adapter_names == ["default"]


def test_a_preset_is_replaced(tmp_path):
    model = adapted(families.bert)
    for seed in (1, 2):
        randomize(model, seed=seed)
        model.save_to_preset(str(tmp_path / "preset"))
        loaded = models.TextClassifier.from_preset(str(tmp_path / "preset"))
        np.testing.assert_array_equal(
            both(loaded, families.TEXTS), both(model, families.TEXTS)
        )
