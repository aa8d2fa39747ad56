"""Drafts: whatever proposes tokens. `load_draft` finds one by name or in a folder."""

import json
from collections.abc import Callable
from pathlib import Path

from specvlm.drafts.base import Draft, DraftSession, NoDraft
from specvlm.drafts.eagle import EagleConfig, EagleDraft, EagleHead
from specvlm.drafts.ngram import NGramDraft, NGramSession

#: Drafts without weights, by name.
BY_NAME: dict[str, Callable[[], Draft]] = {"ngram": NGramDraft}
#: Readers of a draft's folder, by its config's "draft_type".
BY_TYPE: dict[str, Callable[[Path], Draft]] = {"eagle": EagleDraft.from_pretrained}

__all__ = [
    "BY_NAME",
    "BY_TYPE",
    "Draft",
    "DraftSession",
    "EagleConfig",
    "EagleDraft",
    "EagleHead",
    "NGramDraft",
    "NGramSession",
    "NoDraft",
    "load_draft",
]


def load_draft(draft: str | Path) -> Draft:
    """A draft by the name of one without weights, from a folder, or from a hub id, in that order.

    Raises:
        ValueError: nothing of that name is there, or its config.json names no draft that we know.
    """
    if str(draft) in BY_NAME:
        return BY_NAME[str(draft)]()
    folder = Path(draft)
    if not folder.is_dir():
        folder = _from_hub(str(draft))
    config = folder / "config.json"
    try:
        kind = json.loads(config.read_text()).get("draft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"draft: expected {config} to be a JSON object with a draft_type, got {error}") from error
    if kind not in BY_TYPE:
        raise ValueError(f"draft_type: expected {_one_of(BY_TYPE)}, got {kind!r} in {config}")
    return BY_TYPE[kind](folder)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"draft: expected {_one_of(BY_NAME)}, a folder or a hub id, got {name!r} ({reason})"
        ) from error


def _one_of(names: dict[str, Callable]) -> str:
    return " or ".join(repr(name) for name in names) or "nothing"
