"""Subsets of a target's vocabulary, from how often its tokens occur in text: a draft that proposes frequent tokens only
needs a small part of the output head. The target still says every token.

Source: FR-Spec (Zhao et al., 2025).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from specvlm.checks import check_int
from specvlm.files import whole
from specvlm.targets.base import TargetSpec

#: Documents tokenised at once.
_BATCH = 256
#: Where a line of .jsonl may keep its text.
_FIELDS = ("text", "caption")


@dataclass(frozen=True, slots=True)
class Counted:
    """Token frequencies, as far as they are counted.

    Attributes:
        counts: [V] int64 how often each id occurred.
        documents: how many were read.
        bytes_read: of the files.
    """

    counts: Tensor
    documents: int
    bytes_read: int

    def share(self, ids: Sequence[int]) -> float:
        """The part of all tokens that are among `ids`, in [0, 1]."""
        return int(self.counts[list(ids)].sum()) / int(self.counts.sum())


def count_tokens(files: Sequence[Path], spec: TargetSpec) -> Iterator[Counted]:
    """Counts the tokens of text files: .txt, a document a line, or .jsonl, an object with a "text" or "caption" a line.

    Args:
        files: in UTF-8; lines without text are passed over.
        spec: the target's, with its tokenizer, which puts no special tokens around a document.

    Yields:
        what is counted so far, at least once; the last one is of everything. Its counts are one tensor, which grows.

    Raises:
        ValueError: a file of another kind or encoding, a line that is no such object, or no text at all.
        OSError: a file that cannot be read.
    """
    for path in files:
        if path.suffix not in (".txt", ".jsonl"):
            raise ValueError(f"text: expected a .txt or .jsonl file, got {path}")
        path.stat()  # before hours are spent on the files before it
    counts = torch.zeros(spec.vocab_size, dtype=torch.int64)
    documents, bytes_read, batch = 0, 0, list[str]()
    for path in files:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                bytes_read += len(line)
                if text := _document(line, number, path):
                    batch.append(text)
                if len(batch) == _BATCH:
                    counts += _counts(batch, spec)
                    documents += len(batch)
                    batch.clear()
                    yield Counted(counts, documents, bytes_read)
    if batch:
        counts += _counts(batch, spec)
    if not counts.any():
        raise ValueError(f"text: expected at least one token in {', '.join(map(str, files))}, got none")
    yield Counted(counts, documents + len(batch), bytes_read)


def _document(line: bytes, number: int, path: Path) -> str:
    try:
        text = line.decode().strip()
        if text and path.suffix == ".jsonl":
            entry = json.loads(text)
            text = next(entry[name] for name in _FIELDS if isinstance(entry.get(name), str))
    except UnicodeDecodeError as error:
        raise ValueError(f"text: expected UTF-8 in line {number} of {path}, got {error}") from error
    except (ValueError, AttributeError, StopIteration) as error:
        raise ValueError(
            f"text: expected a JSON object with a {' or '.join(_FIELDS)} in line {number} of {path}, got {text[:80]!r}"
        ) from error
    return text.strip()


def _counts(documents: list[str], spec: TargetSpec) -> Tensor:
    """[V] int64."""
    rows = spec.tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[misc]
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    if len(ids) and int(ids.max()) >= spec.vocab_size:
        raise ValueError(f"tokenizer: expected ids below the target's {spec.vocab_size}, got {int(ids.max())}")
    return torch.bincount(ids, minlength=spec.vocab_size)


def check_keep(keep: int, spec: TargetSpec) -> None:
    """Raises a ValueError unless a subset may have `keep` ids: all EOS ids, at most all but images'."""
    check_int("keep", keep, low=max(1, len(spec.eos_ids)), high=spec.vocab_size - len(spec.media_ids))


def most_frequent(counts: Tensor, keep: int, spec: TargetSpec) -> list[int]:
    """The `keep` most frequent ids, ascending; of equally frequent ones the lowest.

    The EOS ids are always among them, image and video ids never.

    Args:
        counts: [V] int64.

    Raises:
        ValueError: fewer than the EOS ids are to be kept, or more than there are.
    """
    check_keep(keep, spec)
    order = counts.sort(descending=True, stable=True).indices.tolist()
    decided = spec.eos_ids | spec.media_ids
    others = [token for token in order if token not in decided]
    return sorted([*spec.eos_ids, *others[: keep - len(spec.eos_ids)]])


def write_vocabulary(path: Path, ids: Sequence[int]) -> None:
    """Writes a subset, {"ids": [...]}, whole or not at all."""
    with whole(path) as fresh:
        fresh.write_text(json.dumps({"ids": list(ids)}) + "\n")


def read_vocabulary(path: str | Path, spec: TargetSpec) -> list[int]:
    """The ids of a subset that `write_vocabulary` wrote, for a draft's `with_vocabulary`.

    Raises:
        ValueError: no such file, or ids that `check_vocabulary` refuses.
    """
    try:
        ids = json.loads(Path(path).read_text())["ids"]
        if not isinstance(ids, list):
            raise TypeError("ids: expected a list")
        check_ids("ids", ids)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"vocabulary: expected a JSON object with a list of ids in {path}, got {error}") from error
    check_vocabulary("vocabulary", ids, spec)
    return ids


def check_ids(name: str, ids: Sequence[int]) -> None:
    """Raises a TypeError unless all of `ids` are integers, a ValueError unless they are 0 or more."""
    for token in ids:
        check_int(name, token, low=0)


def check_vocabulary(name: str, ids: Sequence[int], spec: TargetSpec) -> None:
    """Checks what a draft is to propose.

    Raises:
        ValueError: ids outside the target's vocabulary, ids that do not ascend, image or video ids, or an EOS id that
            is missing.
    """
    wanted = f"{name}: expected ascending ids in [0, {spec.vocab_size})"
    if outside := [token for token in ids if not 0 <= token < spec.vocab_size]:
        raise ValueError(f"{wanted}, got {outside[0]}")
    for before, token in pairwise(ids):
        if before >= token:
            raise ValueError(f"{wanted}, got {token} after {before}")
    if media := sorted(spec.media_ids & set(ids)):
        raise ValueError(f"{name}: expected no image or video ids, got {media}")
    if missing := sorted(spec.eos_ids - set(ids)):
        raise ValueError(f"{name}: expected every EOS id, got none of {missing}")
