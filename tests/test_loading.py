"""Folders whose files are broken: refused by name, before anything is made of them."""

import shutil
from pathlib import Path

import pytest

from specvlm import load
from specvlm.drafts import load_draft
from tests.fakes import tiny_llava, tiny_processor


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """A target's folder."""
    folder = tmp_path_factory.mktemp("stored")
    tiny_llava().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{}", r"target: expected a config.json of a model in .*, got "),
        ("config.json", "[]", r"target: expected a config.json of a model in .*, got "),
        (
            "config.json",
            '{"model_type": "llava", "text_config": "x"}',
            r"target: expected a config.json of a model in ",
        ),
        ("generation_config.json", "[]", r"target: expected a generation_config.json in .*, got "),
        ("generation_config.json", '{"eos_token_id": [2', r"target: expected a generation_config.json in .*, got "),
        (
            "generation_config.json",
            '{"eos_token_id": 9999}',
            r"eos_token_id: expected an integer from 0 to 319, got 9999",
        ),
        ("generation_config.json", '{"max_new_tokens": 0}', r"expected a generation_config.json in .*max_new_tokens"),
        ("generation_config.json", '{"max_time": 3.0}', r"generation config: expected no max_time, got 3.0"),
        ("processor_config.json", "[]", r"target: expected a processor in .*, got "),
        ("tokenizer.json", "{}", r"target: expected a processor in .*, got "),
    ],
)
def test_broken_files_of_a_target(stored, tmp_path, name, content, message):
    folder = tmp_path / "target"
    shutil.copytree(stored, folder)
    assert (folder / name).is_file()
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[]")])
def test_broken_files_of_a_small_model(stored, tmp_path, name, content):
    folder = tmp_path / "draft"
    shutil.copytree(stored, folder)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=r"draft: expected a tokenizer in .*draft, got "):
        load_draft(folder)
