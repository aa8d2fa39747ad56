"""Scenes: a few coloured shapes on a 3 x 3 grid, drawn as a picture.

A scene is the whole truth about its picture, so any statement about the picture can be checked.
"""

import hashlib
import math
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
COLOURS = {
    "red": (214, 40, 45),
    "green": (38, 150, 70),
    "blue": (40, 90, 220),
    "yellow": (248, 210, 50),
    "purple": (150, 60, 190),
    "orange": (245, 130, 30),
}
BACKGROUNDS = {"white": (250, 250, 248), "gray": (172, 176, 182), "black": (26, 27, 32)}

GRID = 3
CELLS = GRID * GRID
MAX_OBJECTS = 5
PICTURE_SIZE = 72
HELD_OUT_SHARE = 10  # one layout in ten is never trained on

_RADIUS = {"small": 0.25, "large": 0.43}  # in cells
_JITTER = {"small": 0.14, "large": 0.06}
_SUPERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class Object:
    """One shape. `cell` counts the grid's cells in reading order; `shift` moves it within its cell, in cells."""

    size: str
    colour: str
    shape: str
    cell: int
    shift: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects in reading order, at most one a cell, on a plain background."""

    objects: tuple[Object, ...]
    background: str

    @property
    def layout(self) -> str:
        """What the picture shows, without background and jitter."""
        return ";".join(f"{o.cell} {o.size} {o.colour} {o.shape}" for o in self.objects)


def random_scene(rng: Random) -> Scene:
    """Draw one to five objects with independent attributes, in distinct cells."""
    cells = sorted(rng.sample(range(CELLS), rng.randint(1, MAX_OBJECTS)))
    return Scene(
        tuple(_random_object(cell, rng) for cell in cells),
        rng.choice(tuple(BACKGROUNDS)),
    )


def held_out(scene: Scene) -> bool:
    """Whether the scene's layout belongs to the tenth that is kept for evaluation."""
    digest = hashlib.sha256(scene.layout.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def split_scene(rng: Random, *, for_evaluation: bool) -> Scene:
    """Draw scenes until one falls on the wanted side of the split."""
    while held_out(scene := random_scene(rng)) != for_evaluation:
        pass
    return scene


def render(scene: Scene, size: int = PICTURE_SIZE) -> Image.Image:
    """Draw the scene as a square RGB picture of `size` pixels a side, anti-aliased."""
    side = size * _SUPERSAMPLING
    picture = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(picture)
    for item in scene.objects:
        _draw_object(draw, item, side / GRID)
    return picture.reduce(_SUPERSAMPLING)


def _random_object(cell: int, rng: Random) -> Object:
    size = rng.choice(SIZES)
    reach = _JITTER[size]
    shift = (round(rng.uniform(-reach, reach), 3), round(rng.uniform(-reach, reach), 3))
    return Object(size, rng.choice(tuple(COLOURS)), rng.choice(SHAPES), cell, shift)


def _draw_object(draw: ImageDraw.ImageDraw, item: Object, cell_side: float) -> None:
    row, column = divmod(item.cell, GRID)
    x = (column + 0.5 + item.shift[0]) * cell_side
    y = (row + 0.5 + item.shift[1]) * cell_side
    radius = _RADIUS[item.size] * cell_side
    fill = COLOURS[item.colour]
    if item.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        draw.polygon([(x + radius * u, y + radius * v) for u, v in _OUTLINES[item.shape]], fill=fill)


def _regular(points: int, inner: float) -> list[tuple[float, float]]:
    """A star's outline, first point up; outer radius 1, with `inner` the radius of its notches."""
    corners = []
    for i in range(2 * points):
        angle = math.pi * (i / points - 0.5)
        radius = inner if i % 2 else 1.0
        corners.append((radius * math.cos(angle), radius * math.sin(angle)))
    return corners


_ARM = 0.34  # half the width of a cross's arms
_OUTLINES = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)],
    "star": [(1.12 * x, 1.12 * y + 0.06) for x, y in _regular(5, 0.45)],
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip
