"""stories260K as a `LlamaCausalLM`: what it writes, and broken files."""

import shutil

import language_models
import pytest
import real_data

# As published by llama2.c.
OPENING = (
    "Once upon a time, there was a little girl named Lily. She loved to play "
    "outside in the park. One day, she saw a big, red ball. She wanted to play "
    "with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't "
    "know what to do. She said, \"I want to play with your ball, but I can't "
    'find it."'
)
pytestmark = language_models.needs_stories


def test_greedy_text_is_the_published_one():
    model = language_models.stories()
    model.compile(sampler="greedy")
    assert model.generate("", max_length=200).startswith(OPENING)


def test_tokens_come_back():
    tokenizer = language_models.stories().preprocessor.tokenizer
    for text in [OPENING, "A café, 3 €\n\n  x\ty 😀", " leading", ""]:
        assert tokenizer.detokenize(tokenizer(text)) == text


@pytest.mark.parametrize("name", ["stories260K.bin", "tok512.bin"])
@pytest.mark.parametrize("kept", [0, 20, -4])
def test_broken_files_are_named(tmp_path, name, kept):
    folder = real_data.REAL.joinpath(*language_models.STORIES)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / name
    cut = path.read_bytes()
    # The published file ends with tables that are not read.
    tables = 2 * 512 * 4 * 4 if name == "stories260K.bin" and kept < 0 else 0
    path.write_bytes(cut[: kept - tables] if kept - tables else b"")
    from stories import load_stories

    with pytest.raises(ValueError, match=name):
        load_stories(tmp_path)
