"""Extractive question answering, from text to answers, on real encoders."""

import subprocess
import sys

import families
import keras
import numpy as np
import pytest
from helpers import array
from helpers import assert_close
from helpers import randomize
from keras_hub import models

import keras_lora_dropout as kld
from keras_lora_dropout import ExtractiveQA
from keras_lora_dropout.question_answering.decoding import decode_answers
from keras_lora_dropout.question_answering.windows import make_windows

# A tokenizer leaves closing its vocabulary file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

# Different questions on the same context, none, and one on a long context.
DATA = [
    ("fox", "a quick fox jumped over the lazy dog", ("quick", 2)),
    ("dog", "a quick fox jumped over the lazy dog", ("lazy", 28)),
    ("fox", "the brown dog jumped over the lazy fox", ("lazy fox", 30)),
    ("dog", "the brown dog jumped over the lazy fox", ("brown", 4)),
    ("jumped", "the lazy dog", None),
    (
        "over",
        "the lazy dog jumped over a brown dog the quick fox",
        ("quick", 41),
    ),
]
QUESTIONS, CONTEXTS, ANSWERS = map(list, zip(*DATA, strict=True))
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def bert():
    task = families.bert()
    return task.preprocessor, enlarged(task.backbone)


def deberta():
    task = families.deberta()
    return task.preprocessor, enlarged(task.backbone)


def roberta():
    task = families.roberta()
    return task.preprocessor, task.backbone


def enlarged(backbone, **options):
    """The same backbone, so large that it can learn the data by heart."""
    config = {
        **backbone.get_config(),
        "max_sequence_length": 32,
        "hidden_dim": 64,
        "dropout": 0.0,
        **options,
    }
    return type(backbone).from_config(config)


def f_net():
    return models.FNetBackbone(
        vocabulary_size=20,
        num_layers=1,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
    )


def inputs_of(model, rows=3, length=6, seed=0):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 9, (rows, length))
    arrays = {
        "token_ids": tokens,
        "segment_ids": np.zeros_like(tokens),
        "padding_mask": np.arange(length) < np.arange(1, rows + 1)[:, None] * 2,
    }
    return {name: arrays[name] for name in model.input}


@pytest.mark.parametrize("make", [bert, deberta, roberta])
def test_logits_are_those_of_each_token(make):
    _, backbone = make()
    model = ExtractiveQA(backbone)
    inputs = inputs_of(model)
    tokens = backbone.predict(inputs, verbose=0)
    if isinstance(tokens, dict):
        tokens = tokens["sequence_output"]
    kernel, bias = map(array, model.get_layer("span_logits").weights)
    expected = np.moveaxis(tokens @ kernel + bias, 2, 1)
    logits = model.predict(inputs, verbose=0)
    assert logits.shape == (3, 2, 6)
    is_token = np.repeat(inputs["padding_mask"][:, None], 2, axis=1)
    assert_close(logits[is_token], expected[is_token])
    assert (logits[~is_token] == -1e4).all()


def test_a_backbone_without_padding_mask():
    model = ExtractiveQA(f_net())
    logits = model.predict(inputs_of(model), verbose=0)
    assert logits.shape == (3, 2, 6)
    assert np.abs(logits).max() < 100


def test_half_precision():
    backbone = enlarged(families.bert().backbone, dtype="mixed_bfloat16")
    model = ExtractiveQA(backbone)
    inputs = inputs_of(model)
    logits = model(inputs)
    assert keras.backend.standardize_dtype(logits.dtype) == "bfloat16"
    assert_close(array(logits)[0, :, 2:], -1e4, 0.01)


def test_the_loss_is_the_mean_of_both_cross_entropies():
    model = ExtractiveQA(bert()[1])
    model.compile(loss=LOSS)
    inputs, targets = inputs_of(model), np.array([[0, 1], [2, 3], [4, 4]])
    logits = model.predict(inputs, verbose=0).astype("float64")
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    start = [logs[row, 0, first] for row, (first, _) in enumerate(targets)]
    end = [logs[row, 1, last] for row, (_, last) in enumerate(targets)]
    loss = model.evaluate(inputs, targets, verbose=0)
    assert_close(loss, -(np.mean(start) + np.mean(end)) / 2)


@pytest.mark.parametrize("make", [bert, deberta, roberta])
def test_what_is_adapted(make):
    _, backbone = make()
    model = kld.enable_lora_dropout(ExtractiveQA(backbone), rank=2)
    assert isinstance(model, ExtractiveQA)
    assert len(model.adapted_layers) == 12
    adapters = {
        id(factor)
        for _, layer in model.adapted_layers
        for factor in layer.factors
    }
    others = [
        variable
        for variable in model.trainable_variables
        if id(variable) not in adapters
    ]
    head = model.get_layer("span_logits").weights
    assert list(map(id, others)) == list(map(id, head))


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_training_minimises_the_mean_over_instances(sampling):
    model = kld.enable_lora_dropout(
        ExtractiveQA(bert()[1]),
        rank=2,
        num_samples=2,
        dropout_rate=0.0,
        sampling=sampling,
        seed=0,
    )
    randomize(model)
    model.compile("sgd", LOSS)
    inputs, targets = inputs_of(model), np.array([[0, 1], [2, 3], [4, 4]])
    # Without dropout, the mean over instances is the loss itself.
    expected = model.evaluate(inputs, targets, verbose=0)
    history = model.fit(inputs, targets, batch_size=3, verbose=0)
    assert_close(history.history["loss"][0], expected)


@pytest.fixture(
    scope="module", params=[bert, deberta], ids=lambda f: f.__name__
)
def trained(request, tmp_path_factory):
    """An adapted model that has learned the data by heart, and its file."""
    keras.utils.set_random_seed(0)
    preprocessor, backbone = request.param()
    # DeBERTaV3's vocabulary has hardly more than letters.
    length, doc_stride, most = (
        (12, 4, 2) if request.param is bert else (32, 8, 6)
    )
    preprocessor.sequence_length = length
    windows = make_windows(
        preprocessor,
        QUESTIONS,
        CONTEXTS,
        ANSWERS,
        doc_stride=doc_stride,
        max_question_length=most,
    )
    assert np.count_nonzero(windows.questions == 5) == 2
    model = kld.enable_lora_dropout(
        ExtractiveQA(backbone),
        rank=8,
        dropout_rate=0.1,
        num_samples=2,
        seed=0,
    )
    model.compile(keras.optimizers.Adam(0.01), LOSS, metrics=["accuracy"])
    model.fit(windows.inputs, windows.targets, epochs=120, verbose=0)
    path = tmp_path_factory.mktemp("qa") / "model.keras"
    model.save(path)
    return model, windows, path


def test_answers_by_heart(trained):
    model, windows, _ = trained
    expected = ["" if answer is None else answer[0] for answer in ANSWERS]
    for logits in (
        model.ensemble_predict(windows.inputs, seed=1, verbose=0),
        model.predict(windows.inputs, verbose=0),
    ):
        found = decode_answers(logits, windows, null_threshold=0)
        assert found == expected


def test_the_same_model_comes_back(trained):
    model, windows, path = trained
    loaded = keras.saving.load_model(path)
    assert type(loaded) is type(model)
    assert loaded.name == model.name
    for method in ("predict", "ensemble_predict"):
        options = {"seed": 3} if method == "ensemble_predict" else {}
        ours, theirs = (
            getattr(m, method)(windows.inputs, verbose=0, **options)
            for m in (model, loaded)
        )
        np.testing.assert_array_equal(ours, theirs)
    metrics = [
        m.ensemble_evaluate(windows.inputs, windows.targets, seed=3, verbose=0)
        for m in (model, loaded)
    ]
    assert_close(*metrics)
    assert metrics[0][1] > 0.9


def test_a_new_process_loads_it(tmp_path):
    model = ExtractiveQA(roberta()[1])
    model.save(tmp_path / "plain.keras")
    kld.enable_lora_dropout(model, rank=2).save(tmp_path / "adapted.keras")
    program = (
        "import sys, keras\n"
        "import keras_lora_dropout\n"
        "for path in sys.argv[1:]:\n"
        "    model = keras.saving.load_model(path)\n"
        "    print(type(model).__name__)"
    )
    paths = [str(tmp_path / f"{name}.keras") for name in ("plain", "adapted")]
    process = subprocess.run(
        [sys.executable, "-c", program, *paths],
        capture_output=True,
        text=True,
        timeout=300,
    )
    expected = ["ExtractiveQA", "LoRADropoutExtractiveQA"]
    assert process.stdout.split()[-2:] == expected, process.stderr


def test_a_plain_model_comes_back(tmp_path):
    model = ExtractiveQA(bert()[1], name="answers")
    model.save(tmp_path / "plain.keras")
    loaded = keras.saving.load_model(tmp_path / "plain.keras")
    assert type(loaded) is ExtractiveQA
    assert loaded.name == "answers"
    inputs = inputs_of(model)
    assert_close(
        loaded.predict(inputs, verbose=0), model.predict(inputs, verbose=0)
    )
    merged = kld.enable_lora_dropout(loaded, rank=2, seed=0)
    randomize(merged)
    before = merged.predict(inputs, verbose=0)
    merged.merge_adapters()
    assert type(merged) is ExtractiveQA
    assert_close(merged.predict(inputs, verbose=0), before)


def bart():
    return models.BartBackbone(
        vocabulary_size=20,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
    )


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: families.vit().backbone, "ViTBackbone"),
        (families.bert, "BertTextClassifier"),
        (families.llama, "LlamaCausalLM"),
        (bart, "BartBackbone"),
        (lambda: "bert_base_en", "str"),
    ],
)
def test_wrong_backbone(make, name):
    with pytest.raises(
        ValueError,
        match=f"takes `token_ids`(.|\n)*of type {name}.*task.backbone",
    ):
        ExtractiveQA(make())
