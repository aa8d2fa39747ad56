"""Sentences with slots that can be said and read back.

A `Sentence` is a template such as ``"The {np} is {place}."``. Saying it fills the slots in one `Style`;
reading it accepts every style and returns the slots' values. A slot's name is its kind, with a digit
where a kind appears twice (``{np2}``) and a capital where a sentence begins (``{A}``).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

from specvlm.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Object, Scene

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Category:
    """What a noun phrase says of an object: any of its attributes, None where it is silent."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    @classmethod
    def of(cls, item: Object) -> "Category":
        """Everything that a noun phrase can say of `item`."""
        return cls(item.size, item.colour, item.shape)

    def matches(self, item: Object) -> bool:
        """Whether `item` has every attribute that is named."""
        return (
            self.size in (None, item.size) and self.colour in (None, item.colour) and self.shape in (None, item.shape)
        )

    def among(self, scene: Scene) -> list[Object]:
        """The scene's objects that match, in reading order."""
        return [item for item in scene.objects if self.matches(item)]


@dataclass(frozen=True, slots=True)
class Item:
    """An entry of an enumeration: a fully described object, with its cell or without."""

    category: Category
    cell: int | None = None


_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ROWS = ("top", "middle", "bottom")
_COLUMNS = ("left", "middle", "right")

# kind -> its wordings, each a surface for every value. Kinds of one group share the style's choice.
_WORDINGS: dict[str, tuple[Mapping[Any, str], ...]] = {
    "size": (
        {"small": "small", "large": "large"},
        {"small": "little", "large": "big"},
        {"small": "tiny", "large": "huge"},
    ),
    "bigger": ({"small": "smaller", "large": "larger"}, {"small": "smaller", "large": "bigger"}),
    "colour": ({name: name for name in COLOURS},),
    "background": ({name: name for name in BACKGROUNDS},),
    "shape": ({name: name for name in SHAPES},),
    "shapes": ({name: name + ("es" if name == "cross" else "s") for name in SHAPES},),
    "noun": ({None: "shape"}, {None: "object"}, {None: "figure"}, {None: "item"}),
    "nouns": ({None: "shapes"}, {None: "objects"}, {None: "figures"}, {None: "items"}),
    "picture": ({None: "picture"}, {None: "image"}, {None: "scene"}),
    "number": (dict(enumerate(_NUMBERS)),),
    "row": (dict(enumerate(_ROWS)),),
    "column": (dict(enumerate(_COLUMNS)),),
    "be": ({True: "is", False: "are"},),
    "is": ({True: "is", False: "is not"},),
    "verdict": ({True: "yes", False: "no"},),
    "place": tuple(
        dict(enumerate(phrases))
        for phrases in (
            (
                "in the top left corner", "in the top middle", "in the top right corner",
                "in the middle left", "in the center", "in the middle right",
                "in the bottom left corner", "in the bottom middle", "in the bottom right corner",
            ),
            (
                "at the upper left", "at the top", "at the upper right",
                "on the left side", "in the middle", "on the right side",
                "at the lower left", "at the bottom", "at the lower right",
            ),
            tuple(
                f"{side} of the {row} row" for row in _ROWS for side in ("on the left", "in the middle", "on the right")
            ),
        )
    ),
}  # fmt: skip
_SILENT = ("noun", "nouns", "picture", "be")
FACT_WORDS = sorted(
    {
        word
        for kind, wordings in _WORDINGS.items()
        if kind not in _SILENT
        for wording in wordings
        for surface in wording.values()
        for word in surface.split()
        if word not in ("in", "the", "on", "at", "of", "is")
    }
)
"""The words that the picture decides."""

_SHARED_CHOICE = {"bigger": "size", "nouns": "noun"}


@dataclass(frozen=True, slots=True)
class Style:
    """One choice of words, kept throughout a question or an answer."""

    size: int = 0
    noun: int = 0
    picture: int = 0
    place: int = 0

    @classmethod
    def draw(cls, rng: Random) -> "Style":
        """Choose words at random."""
        return cls(*(rng.randrange(len(_WORDINGS[kind])) for kind in ("size", "noun", "picture", "place")))

    def word(self, kind: str, value: Any) -> str:
        """The word for `value` in this style."""
        wordings = _WORDINGS[kind]
        choice = getattr(self, _SHARED_CHOICE.get(kind, kind)) if len(wordings) > 1 else 0
        return wordings[choice % len(wordings)][value]


def _say_singular(value: Category, style: Style) -> str:
    head = style.word("shape", value.shape) if value.shape else style.word("noun", None)
    return _with_adjectives(value, head, style)


def _say_plural(value: Category, style: Style) -> str:
    head = style.word("shapes", value.shape) if value.shape else style.word("nouns", None)
    return _with_adjectives(value, head, style)


def _with_adjectives(value: Category, head: str, style: Style) -> str:
    words = [style.word("size", value.size)] if value.size else []
    words += [value.colour] if value.colour else []
    return " ".join([*words, head])


def _say_indefinite(value: Category, style: Style) -> str:
    phrase = _say_singular(value, style)
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _say_tally(value: tuple[int, Category], style: Style) -> str:
    number, category = value
    return f"{_NUMBERS[number]} {(_say_singular if number == 1 else _say_plural)(category, style)}"


def _say_list(value: tuple[Item, ...], style: Style) -> str:
    phrases = [
        _say_indefinite(item.category, style) + ("" if item.cell is None else " " + style.word("place", item.cell))
        for item in value
    ]
    return " and ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)


_SAY: dict[str, Callable[[Any, Style], str]] = {
    "np": _say_singular,
    "group": _say_plural,
    "a": _say_indefinite,
    "tally": _say_tally,
    "list": _say_list,
}


def _either(kind: str) -> str:
    surfaces = {surface for wording in _WORDINGS[kind] for surface in wording.values()}
    return "(?:" + "|".join(sorted(surfaces, key=lambda surface: (-len(surface), surface))) + ")"


_ADJECTIVES = rf"(?:{_either('size')} )?(?:{_either('colour')} )?"
_SINGULAR = rf"{_ADJECTIVES}(?:{_either('shape')}|{_either('noun')})"
_PLURAL = rf"{_ADJECTIVES}(?:{_either('shapes')}|{_either('nouns')})"
_ENTRY = rf"an? {_SINGULAR}(?: {_either('place')})?"
_PATTERNS = {
    "np": _SINGULAR,
    "group": _PLURAL,
    "a": rf"an? {_SINGULAR}",
    "tally": rf"(?:one {_SINGULAR}|(?!one ){_either('number')} {_PLURAL})",
    "list": rf"{_ENTRY}(?:, {_ENTRY})*(?: and {_ENTRY})?",
} | {kind: _either(kind) for kind in _WORDINGS}
_VALUES = {
    kind: {surface: value for wording in wordings for value, surface in wording.items()}
    for kind, wordings in _WORDINGS.items()
}


def _read_category(text: str) -> Category:
    category = Category()
    for word in text.split():
        if word in _VALUES["size"]:
            category = Category(_VALUES["size"][word], category.colour, category.shape)
        elif word in COLOURS:
            category = Category(category.size, word, category.shape)
        else:
            shape = _VALUES["shape"].get(word) or _VALUES["shapes"].get(word)
            category = Category(category.size, category.colour, shape)
    return category


def _read_tally(text: str) -> tuple[int, Category]:
    number, phrase = text.split(" ", 1)
    return _VALUES["number"][number], _read_category(phrase)


def _read_item(text: str) -> Item:
    found = re.fullmatch(rf"an? ({_SINGULAR})(?: ({_either('place')}))?", text)
    assert found is not None, "the pattern that found the text is made of the same parts"
    return Item(_read_category(found[1]), None if found[2] is None else _VALUES["place"][found[2]])


_READ: dict[str, Callable[[str], Any]] = {
    "np": _read_category,
    "group": _read_category,
    "a": lambda text: _read_category(text.split(" ", 1)[1]),
    "tally": _read_tally,
    "list": lambda text: tuple(_read_item(entry) for entry in re.split(r", | and ", text)),
}


@dataclass(frozen=True)
class Sentence:
    """A template, and the claim that it makes of a scene: `claim(scene, asked, values)`."""

    template: str
    claim: Callable[[Scene, Values, Values], bool] = lambda scene, asked, values: True

    def say(self, values: Values, style: Style) -> str:
        """Fill the slots; slots that carry no meaning (nouns, "picture") need no value."""
        return re.sub(r"\{(\w+)\}", lambda slot: self._fill(slot[1], values, style), self.template)

    def read(self, text: str, start: int = 0) -> tuple[Values, int] | None:
        """The slots' values and the end of the match, or None where `text` does not go on with this sentence."""
        found = self._pattern.match(text, start)
        if found is None:
            return None
        return {name: self._read_slot(name, surface) for name, surface in found.groupdict().items()}, found.end()

    @staticmethod
    def _fill(slot: str, values: Values, style: Style) -> str:
        name = slot.lower()
        kind, value = _kind(name), values.get(name)
        surface = _SAY[kind](value, style) if kind in _SAY else style.word(kind, value)
        return surface[0].upper() + surface[1:] if slot[0].isupper() else surface

    @staticmethod
    def _read_slot(name: str, surface: str) -> Any:
        kind, surface = _kind(name), surface[0].lower() + surface[1:]
        return _READ[kind](surface) if kind in _READ else _VALUES[kind][surface]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        parts = re.split(r"\{(\w+)\}", self.template)
        pattern = re.escape(parts[0])
        for slot, literal in zip(parts[1::2], parts[2::2], strict=True):
            flag = "i" if slot[0].isupper() else ""
            pattern += rf"(?P<{slot.lower()}>(?{flag}:{_PATTERNS[_kind(slot.lower())]})){re.escape(literal)}"
        return re.compile(pattern + r"(?: |$)")


def _kind(name: str) -> str:
    return name.rstrip("0123456789")


assert set(SIZES) == set(_WORDINGS["size"][0])
