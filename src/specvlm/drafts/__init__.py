"""Drafts: whatever proposes tokens. `load_draft` finds one by name or in a folder."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from specvlm.demo import HEAD_DIR, SMALL_DIR
from specvlm.drafts.base import Draft, DraftSession, NoDraft
from specvlm.drafts.block import BlockConfig, BlockDraft, BlockHead
from specvlm.drafts.eagle import EagleConfig, EagleDraft, EagleHead
from specvlm.drafts.eagle3 import Eagle3Config, Eagle3Draft, Eagle3Head
from specvlm.drafts.joined import JoinedDraft
from specvlm.drafts.ngram import NGramDraft, NGramSession
from specvlm.drafts.vlm import MODEL_TYPES, VLMDraft
from specvlm.targets.hf_loading import first_line

#: Drafts by name: one without weights, the head of the one that ships, both together, and its small model.
BY_NAME: dict[str, Callable[[], Draft]] = {
    "ngram": NGramDraft,
    "demo": lambda: EagleDraft.from_pretrained(HEAD_DIR),
    "demo-ngram": lambda: JoinedDraft(EagleDraft.from_pretrained(HEAD_DIR)),
    "demo-vlm": lambda: VLMDraft.from_pretrained(SMALL_DIR),
}
#: Readers of a draft's folder, by its config's "draft_type".
BY_TYPE: dict[str, Callable[[Path], Draft]] = {
    "eagle": EagleDraft.from_pretrained,
    "eagle3": Eagle3Draft.from_pretrained,
    "block": BlockDraft.from_pretrained,
}

__all__ = [
    "BY_NAME",
    "BY_TYPE",
    "BlockConfig",
    "BlockDraft",
    "BlockHead",
    "Draft",
    "DraftSession",
    "Eagle3Config",
    "Eagle3Draft",
    "Eagle3Head",
    "EagleConfig",
    "EagleDraft",
    "EagleHead",
    "JoinedDraft",
    "NGramDraft",
    "NGramSession",
    "NoDraft",
    "VLMDraft",
    "load_draft",
]


def load_draft(draft: str | Path) -> Draft:
    """A draft by name, from a folder, or from a hub id, in that order.

    Names are "ngram", "demo", the shipped model's EAGLE head, "demo-ngram", both together, and "demo-vlm", its small
    model.

    A folder holds a draft of ours, which its config.json's "draft_type" names, or a small model of transformers'.

    Raises:
        ValueError: nothing of that name is there, or its config.json names neither a draft that we know nor a model
            that can be one.
    """
    if str(draft) in BY_NAME:
        return BY_NAME[str(draft)]()
    folder = Path(draft)
    if not folder.is_dir():
        folder = _from_hub(str(draft))
    config = folder / "config.json"
    try:
        settings = json.loads(config.read_text())
        kind, model_type = settings.get("draft_type"), settings.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"draft: expected {config} to be a JSON object with a draft_type, got {error}") from error
    if kind is None and model_type in MODEL_TYPES:
        return VLMDraft.from_pretrained(folder)
    if kind is None and model_type is not None:
        raise ValueError(f"model_type: expected {_one_of(MODEL_TYPES)} of a draft, got {model_type!r} in {config}")
    if kind not in BY_TYPE:
        raise ValueError(f"draft_type: expected {_one_of(BY_TYPE)}, got {kind!r} in {config}")
    return BY_TYPE[kind](folder)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer.model"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise ValueError(
            f"draft: expected {_one_of(BY_NAME)}, a folder or a hub id, got {name!r} ({reason})"
        ) from error


def _one_of(names: Iterable[str]) -> str:
    return " or ".join(repr(name) for name in names) or "nothing"
