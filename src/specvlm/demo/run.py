"""The demo's pictures and questions, and the drafts that answer them."""

from dataclasses import dataclass
from random import Random
from typing import Final

from PIL import Image

from specvlm.demo.grammar import ask, check
from specvlm.demo.scenes import GRID, Scene, render, split_scene
from specvlm.drafts import Draft, load_draft

PICTURE_SIDE: Final = 432
QUESTIONS: Final = 2
REPEATS: Final = 3
SECONDS: Final = 5.0  # after which no repeat begins
TEMPERATURES: Final = (0.0, 1.0)
MAX_NEW_TOKENS: Final = 128

_KIND: Final = "describe"
_OBJECTS: Final = 3  # at least


@dataclass(frozen=True, slots=True)
class Task:
    """A scene that training never saw, and a question about it."""

    scene: Scene
    question: str

    @property
    def picture(self) -> Image.Image:
        """The scene, enlarged."""
        return render(self.scene, PICTURE_SIDE)

    @property
    def contents(self) -> str:
        """What is in the scene, in the program's words."""
        objects = (f"{o.size} {o.colour} {o.shape} ({_place(o.cell)})" for o in self.scene.objects)
        return f"{', '.join(objects)}, on {self.scene.background}"

    def is_answered_by(self, text: str) -> bool:
        """Whether `text` says nothing but the truth about the scene, and all that was asked for."""
        return check(self.scene, _KIND, self.question, text)


def tasks(count: int = QUESTIONS, seed: int = 0) -> list[Task]:
    """Questions about held-out scenes that have something to tell; the same for the same seed."""
    rng = Random(f"demo {seed}")
    found: list[Task] = []
    while len(found) < count:
        scene = split_scene(rng, for_evaluation=True)
        asked = ask(scene, _KIND, rng)
        if len(scene.objects) >= _OBJECTS and asked is not None:
            found.append(Task(scene, asked[0]))
    return found


def demo_drafts() -> dict[str | None, Draft | None]:
    """What the demo measures: drafts of every kind that ships, by name, behind autoregressive decoding."""
    return {None: None, "ngram": load_draft("ngram"), "eagle": load_draft("demo"), "vlm": load_draft("demo-vlm")}


def _place(cell: int) -> str:
    """A cell of the grid in words."""
    row, column = divmod(cell, GRID)
    words = [("top", "", "bottom")[row], ("left", "", "right")[column]]
    return " ".join(word for word in words if word) or "centre"
