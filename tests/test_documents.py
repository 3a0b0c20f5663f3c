"""README, guides, API pages and docstrings: all that is in them holds.

Every Python block runs. One with `>>>` is a doctest; one of `python jax` (or
another backend) runs on that backend alone. The blocks of a file share one
namespace, and all run in a folder of their own.
"""

import doctest
import importlib
import inspect
import io
import pathlib
import pkgutil
import re
import runpy
import tomllib

import kagglehub.cache
import kagglehub.handle
import keras
import keras_hub
import numpy as np
import pytest
import sentencepiece
from helpers import BACKEND

import keras_lora_dropout as kld
from keras_lora_dropout import baselines
from keras_lora_dropout import plots
from keras_lora_dropout import theory
from keras_lora_dropout.instruction_tuning import packing
from keras_lora_dropout.instruction_tuning import prompts
from keras_lora_dropout.instruction_tuning import response_data
from keras_lora_dropout.question_answering import decoding
from keras_lora_dropout.question_answering import extractive_qa
from keras_lora_dropout.question_answering import offsets
from keras_lora_dropout.question_answering import scores
from keras_lora_dropout.question_answering import windows

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md"))
API_PAGES = sorted(ROOT.glob("docs/api/*.md"))
PUBLIC = {name: getattr(kld, name) for name in kld.__all__}
PUBLIC |= {
    name: value
    for module in (
        baselines,
        plots,
        theory,
        scores,
        decoding,
        offsets,
        windows,
        extractive_qa,
        packing,
        prompts,
        response_data,
    )
    for name, value in vars(module).items()
    if getattr(value, "__module__", None) == module.__name__
    and not name.startswith("_")
}

BLOCK = re.compile(r"^```(\w*)[ ]?(\w*)\n(.*?)^```$", re.M | re.S)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
THIRD_PARTY_WARNINGS = [
    # KerasHub leaves the file of a SentencePiece vocabulary to the collector.
    "ignore:unclosed file .*vocabulary.spm:ResourceWarning",
    # KerasHub feeds arrays to `fit` by a reader that keeps their order.
    "ignore:`shuffle=True` was passed:UserWarning",
]


def relative(path):
    return str(path.relative_to(ROOT))


def blocks(path, *languages):
    """Return `(language, backend, source, line)` of the fenced blocks."""
    text = path.read_text()
    return [
        (*match.groups(), text[: match.start()].count("\n") + 1)
        for match in BLOCK.finditer(text)
        if match[1] in languages
    ]


def prose(path):
    """The text of a page without its blocks and comments."""
    text = BLOCK.sub("", path.read_text())
    return re.sub(r"<!--.*?-->", "", text, flags=re.S)


class ShapeChecker(doctest.OutputChecker):
    """Takes the shapes of all backends for the tuples that they are."""

    def check_output(self, want, got, optionflags):
        def plain(match):
            return str(tuple(map(int, match[1].split(","))))

        got = re.sub(r"(?:torch\.Size|TensorShape)\(\[(.+?)\]\)", plain, got)
        return super().check_output(want, got, optionflags)


def run_doctest(test, namespace):
    """Run a doctest in a namespace and keep what it defines."""
    test.globs = namespace
    report = io.StringIO()
    runner = doctest.DocTestRunner(
        ShapeChecker(), optionflags=FLAGS, verbose=False
    )
    results = runner.run(test, out=report.write, clear_globs=False)
    assert results.attempted and not results.failed, report.getvalue()


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def one_device():
    """What pages set would be in force for all tests after them."""
    yield
    keras.distribution.set_distribution(None)


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    """A download cache in which `deberta_v3_base_en` is a tiny model.

    It is a real preset, read by KerasHub as one that was downloaded before.
    """
    folder = tmp_path_factory.mktemp("presets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAGGLEHUB_CACHE", str(folder))
        models = keras_hub.models
        preset = models.DebertaV3Backbone.presets["deberta_v3_base_en"]
        handle = kagglehub.handle.parse_model_handle(
            preset["kaggle_handle"].removeprefix("kaggle://")
        )
        cache = kagglehub.cache.Cache()
        target = pathlib.Path(cache.get_path(handle))
        tiny_deberta().save_to_preset(str(target))
        for file in target.rglob("*"):
            if file.is_file():
                cache.mark_as_complete(handle, str(file.relative_to(target)))
    return folder


def tiny_deberta():
    """A DeBERTaV3 classifier that reads raw text, with random weights."""
    words = ["a fine film", "a dull film", "a film of the year"]
    vocabulary = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=vocabulary,
        model_type="word",
        vocab_size=50,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
        minloglevel=2,
    )
    models = keras_hub.models
    tokenizer = models.DebertaV3Tokenizer(vocabulary.getvalue())
    return models.DebertaV3TextClassifier(
        backbone=models.DebertaV3Backbone(
            vocabulary_size=tokenizer.vocabulary_size(),
            num_layers=1,
            num_heads=2,
            hidden_dim=16,
            intermediate_dim=32,
            max_sequence_length=16,
            bucket_size=4,
        ),
        preprocessor=models.DebertaV3TextClassifierPreprocessor(
            tokenizer, sequence_length=8
        ),
        num_classes=2,
    )


def filtered(test):
    for warning in THIRD_PARTY_WARNINGS:
        test = pytest.mark.filterwarnings(warning)(test)
    return test


def pages_with_code():
    for page in PAGES:
        if blocks(page, "python"):
            # The exporters to other formats warn of their own insides.
            exports = page.name == "deployment.md"
            marks = [pytest.mark.filterwarnings("ignore")] * exports
            yield pytest.param(page, marks=marks, id=relative(page))


@filtered
@pytest.mark.parametrize("page", list(pages_with_code()))
def test_python_blocks_run(page, presets, one_device, monkeypatch):
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(presets))
    namespace = {"__name__": "__main__"}
    for _, backend, source, line in blocks(page, "python"):
        assert backend in ("", "jax", "torch", "tensorflow")
        if backend not in ("", BACKEND):
            continue
        name = f"{relative(page)}:{line}"
        if ">>> " in source:
            parser = doctest.DocTestParser()
            test = parser.get_doctest(source, {}, name, str(page), line)
            run_doctest(test, namespace)
        else:
            # Line numbers of an error are those of the page.
            code = compile("\n" * line + source, str(page), "exec")
            exec(code, namespace)


def modules():
    """All modules of the package that this backend can import."""
    yield kld
    for module in pkgutil.walk_packages(kld.__path__, f"{kld.__name__}."):
        folder, _, name = module.name.rpartition(".")
        if folder.endswith("training.backend") and name != BACKEND:
            continue
        yield importlib.import_module(module.name)


DOCSTRINGS = [
    test
    for module in modules()
    for test in doctest.DocTestFinder().find(module)
    if test.examples
]


@pytest.mark.parametrize("test", DOCSTRINGS, ids=lambda test: test.name)
def test_docstrings_run(test):
    run_doctest(test, {"np": np, "keras": keras, **PUBLIC})


def test_every_public_name_has_an_example():
    examples = {test.name.rpartition(".")[2] for test in DOCSTRINGS}
    assert set(PUBLIC) <= examples


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_api_page(name):
    heading = re.compile(rf"^#.*`{name}`", re.M)
    pages = [page for page in API_PAGES if heading.search(page.read_text())]
    assert len(pages) == 1, f"`{name}` has {len(pages)} pages in docs/api."
    index = (ROOT / "docs/index.md").read_text()
    assert f"](api/{pages[0].name})" in index


def signatures():
    """Signatures in the API pages: `text` blocks that are a call."""
    for page in API_PAGES:
        for _, _, source, _ in blocks(page, "text"):
            match = re.fullmatch(r"([\w.]+)\((.*)\)\s*", source, re.S)
            if match:
                yield pytest.param(*match.groups(), id=match[1])


@pytest.mark.parametrize(("name", "arguments"), list(signatures()))
def test_signatures_are_those_of_the_code(name, arguments):
    if name.startswith("model."):
        method = getattr(kld.LoRADropoutModel, name.removeprefix("model."))
        signature = inspect.signature(method.__get__(object()))
    else:
        signature = inspect.signature(PUBLIC[name])
    bare = inspect.Signature(
        [
            parameter.replace(annotation=parameter.empty)
            for parameter in signature.parameters.values()
        ]
    )
    written = re.sub(r",$", "", "".join(arguments.split()))
    assert written == re.sub(r"\s", "", str(bare)[1:-1])


def test_every_public_name_shows_its_signature():
    assert set(PUBLIC) <= {parameters.values[0] for parameters in signatures()}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} is not there."
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(linked), re.M)
            assert anchor in map(slug, headings), f"{target} has no heading."


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_readme_states_the_dependencies_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    for backend in ("jax", "torch", "tensorflow"):
        requirements += project["optional-dependencies"][backend]
    stated = re.findall(r"`([\w-]+>=[\d.]+)`", (ROOT / "README.md").read_text())
    assert sorted(stated) == sorted(r.split(",")[0] for r in requirements)
    python = project["requires-python"].removeprefix(">=")
    assert f"Python {python} or newer" in (ROOT / "README.md").read_text()


def method_rows():
    """`(code, tests)` of the rows of the method's table."""
    lines = (ROOT / "docs/method.md").read_text().splitlines()
    header = next(i for i, line in enumerate(lines) if "| In the code" in line)
    for line in lines[header + 2 :]:
        if not line.startswith("|"):
            return
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        yield pytest.param(*cells[-2:], id=cells[0])


@pytest.mark.parametrize(("code", "tests"), list(method_rows()))
def test_the_method_table_names_code_and_tests(code, tests):
    names = re.findall(r"`([\w.]+)`", code)
    assert names
    for name in names:
        assert resolve(name) is not None
    files = re.findall(r"\((\.\./tests/\w+\.py)\)", tests)
    assert files
    sources = "".join((ROOT / "docs" / file).read_text() for file in files)
    functions = re.findall(r"`(test_\w+)`", tests)
    assert functions
    for function in functions:
        assert f"def {function}(" in sources


def resolve(name):
    """Import what stands in the package as `module.Class.attribute`."""
    parts = name.split(".")
    for stop in range(len(parts), -1, -1):
        try:
            found = importlib.import_module(
                ".".join([kld.__name__, *parts[:stop]])
            )
        except ModuleNotFoundError:
            continue
        for part in parts[stop:]:
            found = getattr(found, part)
        return found
    return None


def test_the_figure_is_that_of_its_script():
    script = runpy.run_path(str(ROOT / "docs/figures/draw_masks.py"))
    figure = (ROOT / "docs/figures/masks.svg").read_text()
    assert figure == script["drawing"](), "Run docs/figures/draw_masks.py."
