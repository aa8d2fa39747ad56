"""Reading examples: every layout that the command takes, and what it says to broken ones."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from specvlm.training.records import QUESTION, Example, Turn, read_examples
from tests.fakes import picture

CAPTIONS = ["A red circle .", "a circle that is red"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures in a folder of a folder."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def write_lines(path: Path, *entries: object) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def pack(folder: Path, tar: Path) -> Path:
    with tarfile.open(tar, "w") as packed:
        packed.add(folder, arcname=".")
    return tar


def names(example: Example) -> list[str]:
    return [stored.name for stored in example.pictures]


def test_lines_of_every_kind(photos):
    lines = write_lines(
        photos / "data.jsonl",
        {"image": "images/0.png", "captions": CAPTIONS, "split": "val"},
        {"images": ["images/0.png", "images/1.png"], "question": "which is red?", "answer": " the first ", "id": 7},
        {"question": "why?", "split": "train"},
        {
            "image": ["images/2.png", "images/1.png"],
            "conversation": [
                {"role": "user", "content": "<image>\nand this?"},
                {"role": "assistant", "content": "a circle"},
                {"role": "user", "content": "and <image> this?"},
            ],
        },
    )
    captioned, both, text, talk = read_examples(lines)
    assert captioned.turns == (Turn(QUESTION, "A red circle. a circle that is red.", 1),)
    assert (captioned.id, names(captioned), captioned.held_out) == ("images/0.png", ["images/0.png"], True)
    assert (both.id, names(both), both.held_out) == ("7", ["images/0.png", "images/1.png"], None)
    assert both.turns == (Turn("which is red?", "the first", 2),)
    assert (text.pictures, text.turns, text.held_out) == ((), (Turn("why?", None),), False)
    assert talk.turns == (Turn("and this?", "a circle", 1), Turn("and  this?", None, 1))
    assert talk.pictures[0].picture().tobytes() == picture(2).tobytes()


def test_llava_conversations_with_pictures_elsewhere(photos, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("json") / "llava.json"
    said = [("human", "what?\n<image>"), ("gpt", "a circle"), ("human", "red?"), ("gpt", "yes")]
    entry = {"id": "a", "image": "1.png", "conversations": [{"from": who, "value": what} for who, what in said]}
    elsewhere.write_text(json.dumps([entry, {"conversations": entry["conversations"][2:]}]))
    first, second = read_examples(elsewhere, pictures=photos / "images")
    assert first.turns == (Turn("what?", "a circle", 1), Turn("red?", "yes"))
    assert first.pictures[0].picture_size() == (50, 40)
    assert second.id == "entry 2 of llava.json"
    assert second.turns == (Turn("red?", "yes"),)


@pytest.mark.parametrize("index", ["metadata.jsonl", "index.jsonl", None])
def test_a_folder_and_a_tar_of_it_read_the_same(photos, tmp_path_factory, index):
    if index is None:
        for number in range(2):  # the third has no caption
            (photos / "images" / f"{number}.txt").write_text(f"circle {number}\n")
    else:
        entries = [{"file_name": f"images/{number}.png", "text": f"circle {number}"} for number in range(2)]
        write_lines(photos / index, *entries)
    tar = pack(photos, tmp_path_factory.mktemp("tar") / "data.tar")
    unpacked, packed = read_examples(photos, question="what?"), read_examples(tar, question="what?")
    assert [one.turns for one in unpacked] == [(Turn("what?", f"circle {number}", 1),) for number in range(2)]
    assert [(one.id, one.turns) for one in packed] == [(one.id, one.turns) for one in unpacked]
    for number, (one, other) in enumerate(zip(unpacked, packed, strict=True)):
        assert other.pictures[0].path == tar
        assert one.pictures[0].read() == other.pictures[0].read()
        assert other.pictures[0].picture().tobytes() == picture(number).tobytes()
    assert sorted(path.name for path in tar.parent.iterdir()) == ["data.tar"]


def test_all_missing_pictures_are_counted_and_ten_are_named(photos):
    entries = [{"image": f"images/{number}.png", "caption": "a"} for number in range(15)]
    lines = write_lines(photos / "data.jsonl", *entries)
    named = ", ".join(f"images/{number}.png" for number in range(3, 13))
    with pytest.raises(ValueError, match=rf"got 12 that are missing: {named} and 2 more$"):
        read_examples(lines)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": "images/0.png"}, "none of them"),
        ({"image": "images/0.png", "captions": [3]}, "3 where text belongs"),
        ({"image": 5, "caption": "a"}, "not iterable"),
        ({"question": " "}, "' ' where text belongs"),
        ({"question": "<image> a"}, "1 <image> for 0 pictures"),
        ({"image": "images/0.png", "question": "a", "answer": "<image>"}, "<image> in an answer"),
        ({"conversations": []}, "messages from nobody"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "messages from gpt"),
        ({"conversations": [{"from": "system", "value": "a"}]}, "a message from 'system'"),
        ([1], r"expected a JSON object in line 2 of data.jsonl, got '\[1\]'"),
    ],
    ids=str,
)
def test_entries_that_are_wrong(photos, entry, message):
    lines = write_lines(photos / "data.jsonl", {"question": "a", "answer": "b"}, entry)
    with pytest.raises(ValueError, match=message) as raised:
        read_examples(lines)
    assert "in line 2 of data.jsonl" in str(raised.value)


def test_files_that_are_wrong(photos):
    (photos / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question"\n')
    (photos / "object.json").write_text("{}")
    (photos / "latin.json").write_bytes(b'["\xe4"]')
    (photos / "text.txt").write_text("a")
    (photos / "empty.jsonl").write_text("\n")
    (photos / "text.tar").write_text("no tar")
    with tarfile.open(photos / "packed.tar", "w:gz") as packed:
        packed.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    for name, message in (
        ("none.jsonl", "data: expected a .jsonl, .json or .tar file or a folder, got .*none.jsonl, which is not there"),
        ("text.txt", "data: expected a .jsonl, .json or .tar file or a folder, got text.txt"),
        ("broken.jsonl", "data: expected a JSON object in line 2 of broken.jsonl"),
        ("object.json", "data: expected a list in object.json, got dict"),
        ("latin.json", "data: expected JSON in UTF-8 in latin.json, got 'utf-8'"),
        ("empty.jsonl", "data: expected at least one example in .*empty.jsonl, got none"),
        ("images", "data: expected at least one example in .*images, got none"),
        ("text.tar", "data: expected an uncompressed tar, got .*text.tar"),
        ("packed.tar", "data: expected an uncompressed tar, got .*packed.tar"),
    ):
        with pytest.raises(ValueError, match=message):
            read_examples(photos / name)


def test_a_picture_that_breaks_off_is_named(photos):
    whole = (photos / "images" / "0.png").read_bytes()
    (photos / "images" / "0.png").write_bytes(whole[:200])
    (example,) = read_examples(write_lines(photos / "data.jsonl", {"image": "images/0.png", "caption": "a"}))
    with pytest.raises(ValueError, match=r"image: expected a whole picture file, got 'images/0.png'"):
        example.pictures[0].picture()
