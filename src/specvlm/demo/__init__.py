"""The small LLaVA that ships with the package, and everything it was made from.

`scenes` renders pictures, `grammar` asks about them, answers and checks answers, `train` makes the model from nothing,
`train_head` an EAGLE head for it, `train_vlm` a smaller model that drafts, and `evaluate` measures the model on layouts
that training never saw.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The trained model: load it with `LlavaForConditionalGeneration.from_pretrained(MODEL_DIR)`."""
HEAD_DIR = Path(__file__).parent / "eagle"
"""Its EAGLE head: load it with `EagleDraft.from_pretrained(HEAD_DIR)`."""
SMALL_DIR = Path(__file__).parent / "vlm"
"""A model of two layers that drafts for it: load it with `VLMDraft.from_pretrained(SMALL_DIR)`."""
