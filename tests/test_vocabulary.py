"""Subsets of a vocabulary: counted by hand, on disk and back, refused when bad, and harmless to an answer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specvlm import SpecVLM
from specvlm.drafts import Eagle3Config, Eagle3Draft, Eagle3Head, EagleConfig, EagleDraft, EagleHead
from specvlm.loading import load, load_spec
from specvlm.targets.base import TargetSpec
from specvlm.tree import DraftTree
from specvlm.vocabulary import count_tokens, most_frequent, read_vocabulary, write_vocabulary
from tests.drafts.formula import spread
from tests.fakes import IMAGE_TOKEN, VOCAB, prompt_for, tiny_llava, tiny_processor

EOS = 2


@pytest.fixture(scope="module")
def specvlm() -> SpecVLM:
    model = tiny_llava(num_key_value_heads=2)
    model.generation_config.eos_token_id = EOS
    return SpecVLM(model, processor=tiny_processor())


@pytest.fixture(scope="module")
def spec(specvlm) -> TargetSpec:
    return specvlm.target.spec


class LetterTokenizer:
    """The id of a letter is 10, 11, ...; special tokens only where they were asked for."""

    def __call__(self, documents: list[str], add_special_tokens: bool = True, verbose: bool = True) -> dict:
        start = [1] if add_special_tokens else []
        return {"input_ids": [start + [10 + ord(letter) - ord("a") for letter in text] for text in documents]}


def last(files: list[Path], spec: TargetSpec):
    *_, found = count_tokens(files, spec)
    return found


def test_counts_by_hand(spec, tmp_path):
    (tmp_path / "a.txt").write_text("abca\n\n  \nbb")
    (tmp_path / "b.jsonl").write_text('{"text": "ca", "caption": "zz"}\n{"id": 3, "caption": "a"}\n')
    letters = replace(spec, tokenizer=LetterTokenizer())
    found = last([tmp_path / "a.txt", tmp_path / "b.jsonl"], letters)
    expected = torch.zeros(VOCAB, dtype=torch.int64)
    expected[10], expected[11], expected[12] = 4, 3, 2
    assert torch.equal(found.counts, expected)
    assert (found.documents, found.bytes_read) == (4, sum(path.stat().st_size for path in tmp_path.iterdir()))
    assert found.share([11, 12, 40]) == 5 / 9


def test_counts_are_told_as_they_grow_and_are_the_tokenizers(spec, tmp_path):
    lines = [f"a red circle, number {i}" for i in range(600)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    steps = [(found.documents, found.bytes_read) for found in count_tokens([tmp_path / "a.txt"], spec)]
    assert [documents for documents, _ in steps] == [256, 512, 600]
    assert steps[-1][1] == (tmp_path / "a.txt").stat().st_size > steps[0][1]
    tokens = [token for line in lines for token in spec.tokenizer.encode(line, add_special_tokens=False)]
    assert torch.equal(last([tmp_path / "a.txt"], spec).counts, torch.bincount(torch.tensor(tokens), minlength=VOCAB))


@pytest.mark.parametrize(
    ("keep", "ids"),
    [
        (1, [EOS]),  # EOS goes before the most frequent token
        (2, [EOS, 9]),
        (3, [EOS, 7, 9]),  # the image token is more frequent, 8 as frequent
        (4, [EOS, 7, 8, 9]),
        (6, [0, 1, EOS, 7, 8, 9]),  # tokens that never occurred, the lowest first
    ],
)
def test_the_most_frequent_ids(spec, keep, ids):
    counts = torch.zeros(VOCAB, dtype=torch.int64)
    counts[9], counts[IMAGE_TOKEN], counts[8], counts[7] = 5, 4, 3, 3
    assert most_frequent(counts, keep, spec) == ids


def test_the_largest_subset_lacks_images_alone(spec):
    found = most_frequent(torch.zeros(VOCAB, dtype=torch.int64), VOCAB - 1, spec)
    assert found == [token for token in range(VOCAB) if token != IMAGE_TOKEN]
    for keep in (0, VOCAB):
        with pytest.raises(ValueError, match=f"keep: expected an integer from 1 to {VOCAB - 1}, got {keep}"):
            most_frequent(torch.zeros(VOCAB), keep, spec)
    with pytest.raises(ValueError, match="keep: expected an integer from 2 to"):
        most_frequent(torch.zeros(VOCAB), 1, replace(spec, eos_ids=frozenset([EOS, 9])))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a", r"text: expected a .txt or .jsonl file, got .*a.csv"),
        ("a.txt", b" \n\n", "text: expected at least one token in .*a.txt, got none"),
        ("a.txt", b"good\n\xff\xfe\n", "text: expected UTF-8 in line 2 of .*a.txt"),
        ("a.jsonl", b'{"caption": "a"}\n{"caption": 3}\n', "JSON object with a text or caption in line 2 of .*a.jsonl"),
        ("a.jsonl", b'["a"]\n', "text: expected a JSON object with a text or caption in line 1"),
        ("a.jsonl", b"{\n", "text: expected a JSON object with a text or caption in line 1"),
    ],
)
def test_bad_text(spec, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        last([tmp_path / name], spec)


def test_files_are_looked_at_before_any_is_read(spec, tmp_path):
    (tmp_path / "a.txt").write_text("a\n" * 600)
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        next(count_tokens([tmp_path / "a.txt", tmp_path / "none.txt"], spec))


def test_a_tokenizer_of_another_model(spec, tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    small = replace(spec, tokenizer=LetterTokenizer(), vocab_size=12)
    with pytest.raises(ValueError, match="tokenizer: expected ids below the target's 12, got 12"):
        last([tmp_path / "a.txt"], small)


def test_a_written_subset_comes_back(spec, tmp_path):
    write_vocabulary(tmp_path / "v.json", [EOS, 7, 9])
    assert read_vocabulary(tmp_path / "v.json", spec) == [EOS, 7, 9]
    assert [path.name for path in tmp_path.iterdir()] == ["v.json"]
    with pytest.raises(ValueError, match=r"vocabulary: expected a JSON object with a list of ids in .*none\.json, got"):
        read_vocabulary(tmp_path / "none.json", spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([2, 7, VOCAB], r"vocabulary: expected ascending ids in \[0, 320\), got 320"),
        ([2, 9, 8], r"vocabulary: expected ascending ids in \[0, 320\), got 8 after 9"),
        ([2, 9, 9], r"vocabulary: expected ascending ids in \[0, 320\), got 9 after 9"),
        ([7, 9], r"vocabulary: expected every EOS id, got none of \[2\]"),
        ([], r"vocabulary: expected every EOS id, got none of \[2\]"),
        ([2, IMAGE_TOKEN], r"vocabulary: expected no image or video ids, got \[4\]"),
        ([2, -1], "ids: expected an integer >= 0, got -1"),
        ([2, 7.5], "list of ids in .*v.json, got ids: expected an integer, got 7.5"),
        ([2, True], "ids: expected an integer, got True"),
        ("2, 7", "list of ids in .*v.json, got ids: expected a list"),
    ],
)
def test_bad_subsets(spec, tmp_path, content, message):
    (tmp_path / "v.json").write_text(json.dumps({"ids": content}))
    with pytest.raises(ValueError, match=message):
        read_vocabulary(tmp_path / "v.json", spec)


@pytest.mark.parametrize("content", ["{", "[2, 7]", "{}"])
def test_files_that_hold_no_subset(spec, tmp_path, content):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ValueError, match=r"vocabulary: expected a JSON object with a list of ids in .*v\.json, got"):
        read_vocabulary(tmp_path / "v.json", spec)


def eagle(spec: TargetSpec) -> EagleDraft:
    torch.manual_seed(1)
    return EagleDraft(EagleHead(EagleConfig.for_target(spec, intermediate_size=96)))


def eagle3(spec: TargetSpec) -> Eagle3Draft:
    torch.manual_seed(1)
    draft = Eagle3Draft(Eagle3Head(Eagle3Config.for_target(spec, intermediate_size=96, draft_vocab_size=201)))
    draft.head.set_vocabulary(torch.tensor([EOS, *range(100, 300)]))
    return draft


@pytest.mark.parametrize("whole", [eagle, eagle3])
def test_any_eagle_draft_takes_one_and_the_answer_stays(specvlm, spec, monkeypatch, tmp_path, whole):
    ids = [EOS, *range(50, 180, 3)]
    write_vocabulary(tmp_path / "v.json", ids)
    trees: list[DraftTree] = []
    draft = whole(spec).with_vocabulary(read_vocabulary(tmp_path / "v.json", spec))
    select = type(draft.policy).select
    monkeypatch.setattr(type(draft.policy), "select", lambda *args: trees.append(select(*args)) or trees[-1])
    prompt = prompt_for(specvlm.target.model)
    for temperature in (0.0, 1.0):
        options = prompt | {"temperature": temperature, "max_new_tokens": 24}
        expected = specvlm.generate(**options, draft=None).tokens
        assert specvlm.generate(**options, draft=draft).tokens == expected
        draft.save_pretrained(tmp_path / "head")
        assert specvlm.generate(**options, draft=tmp_path / "head").tokens == expected
    proposed = {token for tree in trees for token in tree.tokens[0, 1:][tree.parents[0, 1:] >= 0].tolist()}
    assert proposed
    assert proposed <= set(ids)


@pytest.mark.parametrize("whole", [eagle, eagle3])
@torch.no_grad()
def test_the_logits_are_those_of_the_whole_head(specvlm, spec, whole):
    draft, cut = whole(spec), whole(spec).with_vocabulary([EOS, 120, 150])
    draft.bind(specvlm.target)
    cut.bind(specvlm.target)
    hidden = torch.randn(1, 3, spec.hidden_size)
    full, found = (spread(one, one.logits(hidden)) for one in (draft, cut))
    kept = [token for token in (EOS, 120, 150) if full[0, 0, token] > -torch.inf]
    torch.testing.assert_close(found[..., kept], full[..., kept])
    assert (found > -torch.inf).sum() == 3 * len(kept)
    assert kept == [EOS, 120, 150]


def test_subsets_that_a_draft_refuses(specvlm, spec):
    with pytest.raises(ValueError, match=r"eagle vocabulary: expected every EOS id, got none of \[2\]"):
        eagle(spec).with_vocabulary([7, 8, 9]).bind(specvlm.target)
    with pytest.raises(ValueError, match="draft_vocab_size: expected an integer from 1 to 320, got 0"):
        eagle(spec).with_vocabulary([])
    with pytest.raises(ValueError, match="eagle3 vocabulary: expected some of the head's 201 tokens, got none"):
        eagle3(spec).with_vocabulary([7])
    with pytest.raises(ValueError, match=r"eagle3 d2t: expected every EOS id, got none of \[2\]"):
        eagle3(spec).with_vocabulary([120, 150, 180]).bind(specvlm.target)


@pytest.mark.parametrize("whole", [eagle, eagle3])
@pytest.mark.parametrize("ids", [[EOS, 120.5], [2.0, 120], [EOS, True]], ids=str)
def test_subsets_of_what_are_no_ids(spec, whole, ids):
    with pytest.raises(TypeError, match=r"eagle3? vocabulary: expected an integer, got (120.5|2.0|True)"):
        whole(spec).with_vocabulary(ids)
    with pytest.raises(ValueError, match=r"eagle3? vocabulary: expected an integer >= 0, got -1"):
        whole(spec).with_vocabulary([-1, EOS])


def test_what_a_folder_tells_without_its_weights(specvlm, tmp_path):
    specvlm.target.model.save_pretrained(tmp_path)
    specvlm.processor.save_pretrained(tmp_path)
    loaded, found = load(tmp_path, dtype="float32", device="cpu").target.spec, load_spec(tmp_path)
    assert replace(found, tokenizer=None) == replace(loaded, tokenizer=None)
    assert type(found.tokenizer) is type(loaded.tokenizer)
    (tmp_path / "model.safetensors").unlink()
    assert load_spec(tmp_path).eos_ids == {EOS}
    (tmp_path / "generation_config.json").unlink()
    assert load_spec(tmp_path).eos_ids == {EOS}  # the language model's own
    assert load_spec("demo").vocab_size == load("demo").target.spec.vocab_size
