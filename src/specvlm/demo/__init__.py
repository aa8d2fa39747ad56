"""The small LLaVA that ships with the package, and everything it was made from.

`scenes` renders pictures, `grammar` asks about them, answers and checks answers, `train` makes the model
from nothing, `train_head` an EAGLE head for it, and `evaluate` measures it on layouts that training never saw.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The trained model: load it with `LlavaForConditionalGeneration.from_pretrained(MODEL_DIR)`."""
