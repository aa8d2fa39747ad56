"""The small LLaVA that ships with the package, its draft head, and everything they were made from.

`scenes` renders pictures, `grammar` asks about them, answers and checks answers, `train` makes the model
from nothing, `train_head` its EAGLE head, and `evaluate` measures it on layouts that training never saw.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The trained model: load it with `LlavaForConditionalGeneration.from_pretrained(MODEL_DIR)`."""

HEAD_DIR = Path(__file__).parent / "eagle"
"""Its draft head: `EagleDraft.from_pretrained(HEAD_DIR)`."""
