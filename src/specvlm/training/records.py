"""Pictures and conversations from files: JSON lines, LLaVA's conversation JSON, a folder, a tar that stays packed."""

import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from PIL import Image

from specvlm.pictures import open_picture, picture_size

#: What is asked about a picture that comes with captions alone.
QUESTION: Final = "Please give a detailed description of the picture."

_INDEXES: Final = ("metadata.jsonl", "index.jsonl")
_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_MARK: Final = "<image>"
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")
_NAMED: Final = 10


@dataclass(frozen=True, slots=True)
class Stored:
    """A file, or the part of a tar that is one.

    Attributes:
        name: what the data call it.
        path: where its bytes are, `size` of them from `offset` on; -1: to the end.
    """

    name: str
    path: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """Its bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def picture(self) -> Image.Image:
        """The picture in it, as RGB.

        Raises:
            ValueError: it is not a whole picture.
        """
        return open_picture(self.read(), self.name)

    def picture_size(self) -> tuple[int, int]:
        """Its (width, height), without decoding it.

        Raises:
            ValueError: it is no picture.
        """
        return picture_size(self.read(), self.name)


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer.

    Attributes:
        answer: None: the target is to say it.
        pictures: how many of the example's pictures come with the question.
        ended: the answer came to its end, and was not cut.
    """

    question: str
    answer: str | None
    pictures: int = 0
    ended: bool = True


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation about pictures.

    Attributes:
        id: what the data call it, else its first picture, else where it stands.
        pictures: in the order in which the turns show them.
        held_out: whether the data say that it is not for training; None: they say nothing.
    """

    id: str
    pictures: tuple[Stored, ...]
    turns: tuple[Turn, ...]
    held_out: bool | None = None


class Shelf(Protocol):
    """Where files are looked up by name."""

    def find(self, name: str) -> Stored | None:
        """The file of that name; None: there is none."""
        ...

    def names(self) -> Iterable[str]:
        """All of them."""
        ...


class Folder:
    """Files below a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def find(self, name: str) -> Stored | None:
        path = self._path / name
        return Stored(name, path) if path.is_file() else None

    def names(self) -> Iterator[str]:
        return (path.relative_to(self._path).as_posix() for path in sorted(self._path.rglob("*")) if path.is_file())


class Tar:
    """Files of an uncompressed tar, indexed once and read where they lie.

    Raises:
        ValueError: it is compressed, or no tar.
    """

    def __init__(self, path: Path) -> None:
        try:
            with tarfile.open(path, "r:") as tar:
                files = {member.name.removeprefix("./"): member for member in tar if member.isfile()}
        except tarfile.TarError as error:
            raise ValueError(f"data: expected an uncompressed tar, got {path}: {error}") from error
        self._files = {name: Stored(name, path, member.offset_data, member.size) for name, member in files.items()}

    def find(self, name: str) -> Stored | None:
        return self._files.get(name.removeprefix("./"))

    def names(self) -> Iterable[str]:
        return self._files


def read_examples(data: Path, *, pictures: Path | None = None, question: str = QUESTION) -> list[Example]:
    """The examples of `data`, in its order.

    Args:
        data: one of
            - .jsonl, an object a line: `image` or `images` (paths from the file's folder; none: text alone), and
              `conversations`, or `question` and `answer`, or `captions` (joined into one answer) or `caption`; besides
              `id` and `split` ("train"; anything else is held out), if it says so;
            - .json, a list of such objects, as LLaVA's data are: `conversations` of {"from": "human" or "gpt",
              "value"}, where "<image>" stands for a picture;
            - a folder or a .tar with metadata.jsonl or index.jsonl of such lines in it, or with pictures and beside
              each a .txt of its caption.
        pictures: a folder or .tar that the paths start from instead.
        question: what is asked where the data have captions alone.

    Raises:
        ValueError: nothing that can be read so is there, an entry is not as above, or picture files are missing: their
            number and the first 10 are told.
    """
    if not data.exists():
        raise ValueError(f"data: expected a .jsonl, .json or .tar file or a folder, got {data}, which is not there")
    home = _shelf(data)
    shelf = home if pictures is None else _shelf(pictures)
    index = data.name if data.is_file() and data.suffix != ".tar" else _index(home)
    if index is None:
        entries = _captioned(home)
    else:
        found = home.find(index)
        assert found is not None
        entries = _entries(found, index if data.is_file() and data.name == index else f"{index} in {data}")
    missing: list[str] = []
    examples = [_example(entry, where, shelf, question, missing) for where, entry in entries]
    if missing:
        named = ", ".join(missing[:_NAMED]) + (f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else "")
        raise ValueError(f"data: expected every picture of {data}, got {len(missing)} that are missing: {named}")
    if not examples:
        raise ValueError(f"data: expected at least one example in {data}, got none")
    return examples


def _shelf(path: Path) -> Shelf:
    if path.is_dir():
        return Folder(path)
    return Tar(path) if path.suffix == ".tar" else Folder(path.parent)


def _index(shelf: Shelf) -> str | None:
    return next((name for name in _INDEXES if shelf.find(name) is not None), None)


def _entries(index: Stored, told: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every object of an index, and where it stands."""
    if Path(index.name).suffix not in (".json", ".jsonl"):
        raise ValueError(f"data: expected a .jsonl, .json or .tar file or a folder, got {told}")
    word = "entry" if index.name.endswith(".json") else "line"
    try:
        text = index.read().decode()
        listed = json.loads(text) if word == "entry" else [line for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"data: expected JSON in UTF-8 in {told}, got {error}") from error
    if not isinstance(listed, list):
        raise ValueError(f"data: expected a list in {told}, got {type(listed).__name__}")
    for number, given in enumerate(listed, 1):
        where = f"{word} {number} of {told}"
        try:
            entry = json.loads(given) if word == "line" else given
        except ValueError as error:
            raise ValueError(f"data: expected a JSON object in {where}, got {given[:80]!r}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"data: expected a JSON object in {where}, got {str(given)[:80]!r}")
        yield where, entry


def _captioned(shelf: Shelf) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Pictures with a .txt beside them."""
    for name in shelf.names():
        stem, dot, suffix = name.rpartition(".")
        if dot and f".{suffix.lower()}" in _SUFFIXES and (caption := shelf.find(f"{stem}.txt")) is not None:
            yield name, {"image": name, "caption": caption.read().decode().strip()}


def _example(entry: Mapping[str, Any], where: str, shelf: Shelf, question: str, missing: list[str]) -> Example:
    """An entry as an example; pictures that are not there are added to `missing`."""
    try:
        names = _listed(next((entry[key] for key in ("image", "images", "file_name") if key in entry), []))
        turns = _turns(entry, question, len(names))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"data: expected conversations, question and answer, or captions, in {where}, got {error}"
        ) from error
    found = [shelf.find(name) for name in names]
    missing += [name for name, stored in zip(names, found, strict=True) if stored is None]
    pictures = tuple(stored for stored in found if stored is not None)
    split = entry.get("split")
    told = entry.get("id", names[0] if names else where)
    return Example(str(told), pictures, turns, None if split is None else split != "train")


def _turns(entry: Mapping[str, Any], question: str, pictures: int) -> tuple[Turn, ...]:
    said = entry.get("conversations", entry.get("conversation"))
    if said is not None:
        pairs = _paired([_message(one) for one in said])
    elif "question" in entry:
        pairs = [(_text(entry["question"]), None if "answer" not in entry else _text(entry["answer"]))]
    else:
        given = next((entry[key] for key in ("answer", "captions", "caption", "text") if key in entry), None)
        if given is None:
            raise KeyError("none of them")
        pairs = [(question, _sentences(given) if isinstance(given, list) else _text(given))]
    marks = [asked.count(_MARK) for asked, _ in pairs]
    if not any(marks):
        marks[0] = pictures
    if sum(marks) != pictures:
        raise ValueError(f"{sum(marks)} {_MARK} for {pictures} pictures")
    if any(_MARK in (answer or "") for _, answer in pairs):
        raise ValueError(f"{_MARK} in an answer")
    return tuple(
        Turn(asked.replace(_MARK, "").strip(), answer, count)
        for (asked, answer), count in zip(pairs, marks, strict=True)
    )


def _message(one: Mapping[str, Any]) -> tuple[str, str]:
    """Who speaks, and what."""
    who, what = (one["from"], one["value"]) if "from" in one else (one["role"], one["content"])
    if who not in (*_ASKS, *_ANSWERS):
        raise ValueError(f"a message from {who!r}")
    return who, _text(what)


def _paired(messages: Sequence[tuple[str, str]]) -> list[tuple[str, str | None]]:
    """Questions with their answers; the last one may have none."""
    asked, answers = messages[::2], messages[1::2]
    if not asked or any(who not in _ASKS for who, _ in asked) or any(who not in _ANSWERS for who, _ in answers):
        raise ValueError(f"messages from {', '.join(who for who, _ in messages) or 'nobody'}")
    said: list[str | None] = [text for _, text in answers]
    return [(text, said[turn] if turn < len(said) else None) for turn, (_, text) in enumerate(asked)]


def _sentences(captions: Sequence[Any]) -> str:
    """Captions as one text, each with one full stop."""
    return " ".join(_text(caption).rstrip(" .") + "." for caption in captions)


def _listed(names: Any) -> list[str]:
    return [_text(name) for name in ([names] if isinstance(names, str) else names)]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"{value!r} where text belongs")
    return value.strip()
