"""The smallest cases of the faults that the fuzzed tests have found."""

import fractions
import json

import fuzzed_models
import fuzzed_texts
import fuzzing
import keras
import numpy as np
import pytest
from helpers import adapted_mlp
from helpers import array
from helpers import tiny_mlp

import keras_lora_dropout as kld
from keras_lora_dropout import theory
from keras_lora_dropout.instruction_tuning import packing
from keras_lora_dropout.instruction_tuning import response_data
from keras_lora_dropout.plots import plot_history
from keras_lora_dropout.question_answering import decoding
from keras_lora_dropout.question_answering import offsets
from keras_lora_dropout.question_answering import scores
from keras_lora_dropout.question_answering import windows
from keras_lora_dropout.storage.adapter_files import read_adapter_files
from keras_lora_dropout.storage.adapter_files import write_adapter_files

ALMOST_ONE = fractions.Fraction(10**400 - 1, 10**400)
X = fuzzed_models.X
SCORES = [[0, 1, 3]]


class Tokenizer:
    end_token_id = 0

    def __call__(self, text):
        return list(text.encode())


def metric(cls, *data):
    return cls().update_state(*data)


REFUSED = {
    "alpha beyond floats": lambda: kld.LoRADropoutDense(3, alpha=10**400),
    "alpha beyond float32": lambda: kld.LoRADropoutDense(3, alpha=1e39),
    "alpha that underflows": lambda: kld.LoRADropoutDense(3, alpha=5e-324),
    "rank beyond floats": lambda: kld.LoRADropoutDense(3, rank=10**400),
    "rate that rounds to 1": lambda: kld.LoRADropoutDense(
        3, dropout_rate=ALMOST_ONE
    ),
    "rate that float32 takes for 1": lambda: kld.LoRADropoutDense(
        3, dropout_rate=1 - 2**-53
    ),
    "weight beyond floats": lambda: kld.Consistency(10**400),
    "kind that is an array": lambda: kld.Consistency(kind=np.array(["a", "b"])),
    "steps beyond floats": lambda: kld.RankBudget(1, total_steps=10**400),
    "interval beyond int32": lambda: kld.RankBudget(1, mask_interval=2**31),
    "steps that are no number": lambda: kld.RankBudget(1).phases(""),
    "ranks that are no list": lambda: kld.RankBudget(1).schedule(10, 3),
    "ranks below the target": lambda: kld.RankBudget(3).schedule(10, [2]),
    "absurd repetition": lambda: kld.enable_lora_dropout(
        tiny_mlp(), rank=1, target_layers="a{99999999999}"
    ),
    "absurd depth": lambda: kld.enable_lora_dropout(
        tiny_mlp(), rank=1, target_layers=3000 * "("
    ),
    "absurd depth of a key": lambda: kld.enable_lora_dropout(
        tiny_mlp(), rank=1, rank_pattern={3000 * "(": 1}
    ),
    "absurd block": lambda: kld.enable_lora_dropout(
        fuzzed_models.attention(), rank=1, blocks="first " + 5000 * "9"
    ),
    "instances beyond memory": lambda: adapted_mlp(num_samples=10**12),
    "batches of none": lambda: adapted_mlp().ensemble_predict(X, -1),
    "adapter of an array": lambda: adapted_mlp().set_adapter(np.ones(2)),
    "bins beyond memory": lambda: kld.ExpectedCalibrationError(10**12),
    "labels too many": lambda: metric(
        kld.ExpectedCalibrationError, [0, 1, 1], [[0.5, 0.5]] * 2
    ),
    "labels without an axis": lambda: metric(kld.BrierScore, 1, [[0.5, 0.5]]),
    "predictions without an axis": lambda: metric(kld.BrierScore, [1], 0.5),
    "weights too many": lambda: metric(
        kld.ExpectedCalibrationError, [1], [[0.5, 0.5]], [1.0, 2.0]
    ),
    "labels of text": lambda: metric(kld.BrierScore, "a", [[0.5, 0.5]]),
    "rates of text": lambda: theory.sparsity("0.5"),
    "rates of booleans": lambda: theory.sparsity([True]),
    "learning rate that underflows": lambda: kld.lora_plus(
        keras.optimizers.SGD(), 1e-107
    ),
    "constant that overflows": lambda: theory.GeneralizationBound(
        9, regularization=1.7e308, loss_range=1.7e308
    ),
    "rates beyond memory": lambda: theory.sparsity(range(10**12)),
    "texts beyond memory": lambda: scores.score_answers(range(10**12), []),
    "spans without axes": lambda: decoding.decode_answer(
        SCORES, SCORES, 3, "Denver"
    ),
    "length of an answer": lambda: decoding.best_span(
        SCORES, SCORES, [[True] * 3], max_length=None
    ),
    "windows that are none": lambda: decoding.decode_answers([], None),
    "answer that is none": lambda: scores.normalize_answer(None),
    "answers that are no list": lambda: scores.score_answers(["a"], 3),
    "tokenizer that is none": lambda: response_data.make_response_data(
        None, ["a"], ["b"], sequence_length=4
    ),
    "response with half a character": lambda: response_data.make_response_data(
        Tokenizer(), ["a"], ["\ud800"], sequence_length=4
    ),
    "text with half a character": lambda: offsets.tokenize_with_spans(
        fuzzed_texts.tokenizer(), "a \ud800"
    ),
    "predictions of no class": lambda: metric(
        kld.ExpectedCalibrationError, [2], []
    ),
    "predictions of no class, squared": lambda: metric(kld.BrierScore, [2], []),
    "long name of a metric": lambda: plot_history(
        {"loss": [1]}, metric=3000 * "("
    ),
    "class for a function": lambda: kld.enable_lora_dropout(
        tiny_mlp(), rank=1, target_layers=keras.layers.Dense
    ),
    "dropout that is not there": lambda: adapted_mlp().ensemble_predict(
        X, include_transformer_dropout=True
    ),
    "answer elsewhere": lambda: windows.make_windows(
        fuzzed_texts.preprocessor(), ["dog"], ["a"], [("dog", 2)], doc_stride=0
    ),
    "length beyond memory": lambda: response_data.make_response_data(
        Tokenizer(), ["a"], ["b"], sequence_length=10**12
    ),
    "metric that is no text": lambda: plot_history({"loss": [1]}, metric=0),
    "model of another kind": lambda: packing.isolate_packed_examples(range(2)),
    "model that was not merged": lambda: kld.unmerge_adapters(range(2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_what_was_received(name):
    with pytest.raises(
        (ValueError, TypeError), match=r"(?s)Received|=-1|less"
    ) as caught:
        REFUSED[name]()
    assert len(str(caught.value)) < 6000


@pytest.mark.parametrize("options", [{"num_samples": np.int64(2)}, {}])
def test_numbers_of_numpy_are_kept_as_plain_ones(options, tmp_path):
    options["rank_budget"] = kld.RankBudget(np.int64(1), beta_1=np.float32(0.5))
    model = kld.enable_lora_dropout(tiny_mlp(), rank=np.int64(2), **options)
    model.save_adapters(tmp_path)
    model.load_adapters(tmp_path)
    json.dumps(model.rank_budget.get_config())


def test_a_batch_size_of_numpy():
    model = adapted_mlp()
    expected = model.ensemble_predict(X, 2, seed=0, verbose=0)
    found = model.ensemble_predict(X, np.int64(2), seed=0, verbose=0)
    np.testing.assert_array_equal(found, expected)


def test_the_largest_strength_changes_no_output():
    layer = kld.LoRADropoutDense(
        3, rank=1, alpha=1e20, rescale=True, dropout_rate=0.9999999
    )
    masked, mean = layer(X, training=True), layer(X)
    plain = X @ array(layer.kernel) + array(layer.bias)
    np.testing.assert_allclose(array(masked), plain, atol=1e-6)
    np.testing.assert_allclose(array(mean), plain, atol=1e-6)


@pytest.mark.parametrize("value", [1e-99, 1e99])
def test_bounds_of_extreme_constants(value):
    bound = theory.GeneralizationBound(9, value, 0, 1 / value, value)
    assert not np.isnan(bound.gap([0, 0.5])).any()
    assert bound.stability(0) == np.inf


def test_a_label_that_is_no_class_is_never_right():
    brier = kld.BrierScore()
    brier.update_state([5], [[0.5, 0.5]])
    assert float(array(brier.result())) == 0.5


def test_a_failed_prediction_leaves_the_seed():
    model, same = adapted_mlp(), adapted_mlp()
    with pytest.raises((ValueError, RuntimeError)):
        model.ensemble_predict(np.zeros((2, 5), "float32"), verbose=0)
    np.testing.assert_array_equal(
        model.ensemble_predict(X, verbose=0),
        same.ensemble_predict(X, verbose=0),
    )


def test_a_failed_export_leaves_the_earlier_one(tmp_path):
    model = fuzzed_models.adapted_bert()
    model.export_peft(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError, match="Received: base_model_name_or_path="):
        model.export_peft(tmp_path, base_model_name_or_path=object())
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["layers"]["first"].update(rescale="false"),
        lambda s: s["layers"]["first"].update(rank=2.7),
        lambda s: s["layers"]["first"].update(rank="2"),
        lambda s: s["layers"]["first"].update(seed=True),
        lambda s: s.update(rank_budget=[]),
        lambda s: s.update(base_fingerprint=3),
        lambda s: s["rank_record"].update(step=[2**70]),
        lambda s: s["rank_record"]["ranks"].update(first=[2**70]),
        lambda s: s["rank_record"]["ranks"].update(first="1"),
        lambda s: s["rank_record"]["ranks"].pop("first"),
        lambda s: s["rank_record"]["step"].append(9),
    ],
)
def test_settings_of_another_type_leave_the_model_alone(change, tmp_path):
    model = adapted_mlp(rank_budget=kld.RankBudget(1))
    model.fit(X, fuzzed_models.Y, epochs=5, verbose=0)
    model.compact_ranks()
    model.save_adapters(tmp_path)
    settings, tensors = read_adapter_files(tmp_path)
    change(settings)
    write_adapter_files(tmp_path, settings, tensors)
    before = fuzzing.state_of(model)
    with pytest.raises(ValueError, match="not what `save_adapters` writes"):
        model.load_adapters(tmp_path)
    fuzzing.assert_same_state(fuzzing.state_of(model), before)


def test_predictions_that_are_booleans():
    score = kld.BrierScore()
    score.update_state([0, 1], np.array([True, False]))
    assert float(score.result()) == 2
