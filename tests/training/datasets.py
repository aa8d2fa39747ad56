"""A small target on disk, and something to learn from, for tests of the whole command."""

import json
from pathlib import Path
from random import Random

from tests.fakes import picture, tiny_llava, tiny_processor

WORDS = ("a", "red", "circle", "is", "left", "of", "the", "blue", "star", "what", "under", "two", "green", "squares")


def small_target(folder: Path) -> Path:
    """A target whose answers end at its own EOS, if they happen to."""
    model = tiny_llava()
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def small_data(folder: Path, count: int = 14, seed: int = 0) -> Path:
    """Questions and answers of unequal length about pictures of noise; every seventh is held out."""
    rng = Random(seed)
    lines = []
    for number in range(count):
        name = f"{number % 5}.png"
        picture(number % 5).save(folder / name)
        question, answer = (" ".join(rng.choices(WORDS, k=rng.randint(1, most))) for most in (4, 14))
        split = "val" if number % 7 == 0 else "train"
        lines.append({"image": name, "question": question, "answer": f"{answer} end", "split": split, "id": number})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
