"""What a sentence can claim of a scene, and the shape that every kind of question shares.

A claim is a function of the scene, of what the question asked and of the sentence's values; it says
whether the sentence is true.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import cast

from specvlm.demo.scenes import GRID, Object, Scene
from specvlm.demo.wording import Category, Item, Sentence, Values

Said = tuple[Sentence, Values]
ANYTHING = Category()


@dataclass(frozen=True, slots=True)
class Form:
    """One kind of question: how it is worded, drawn, answered and judged.

    `draw` returns the question's values, or None where the scene does not lend itself to the question.
    `answer` returns sentences with their values. An answer is complete if `complete` says so of its sentences.
    """

    questions: tuple[Sentence, ...]
    draw: Callable[[Scene, Random], Values | None]
    answer: Callable[[Scene, Values, Random], list[Said]]
    sentences: tuple[Sentence, ...]
    complete: Callable[[Scene, Values, list[Said]], bool]


def questions(*templates: str) -> tuple[Sentence, ...]:
    """Templates that claim nothing."""
    return tuple(Sentence(template) for template in templates)


def sentences(claim: Callable[[Scene, Values, Values], bool], *templates: str) -> tuple[Sentence, ...]:
    """Templates that make the same claim."""
    return tuple(Sentence(template, claim) for template in templates)


def has_one_of(*groups: tuple[Sentence, ...]) -> Callable[[Scene, Values, list[Said]], bool]:
    """An answer is complete if it says a sentence of every group."""

    def complete(scene: Scene, asked: Values, said: list[Said]) -> bool:
        return all(any(sentence in group for sentence, _ in said) for group in groups)

    return complete


def the_only(category: Category, scene: Scene) -> Object | None:
    """The object that a definite noun phrase means, or None where it is ambiguous or absent."""
    found = category.among(scene)
    return found[0] if len(found) == 1 else None


def at(cell: int, scene: Scene) -> Object | None:
    """The object in a cell."""
    return next((item for item in scene.objects if item.cell == cell), None)


def subject(scene: Scene, asked: Values) -> Object:
    """The object that a question that `applies` is about: at the place it names, else the one it describes."""
    return cast(Object, at(asked["place"], scene) if "place" in asked else the_only(asked["np"], scene))


def applies(asked: Values, scene: Scene) -> bool:
    """Whether every object that the question names exists, once."""
    if "np" in asked and "place" in asked:
        return fits(at(asked["place"], scene), {"np": asked["np"]})
    return all(the_only(asked[name], scene) is not None for name in ("np", "np2") if name in asked)


def facts(item: Object) -> Values:
    """Values for every slot that can speak of one object."""
    row, column = divmod(item.cell, GRID)
    return {
        "a": Category.of(item),
        "size": item.size,
        "colour": item.colour,
        "shape": item.shape,
        "place": item.cell,
        "row": row,
        "column": column,
    }


def tally(category: Category, scene: Scene) -> Values:
    """Values for a sentence that counts a category."""
    number = len(category.among(scene))
    return {"tally": (number, category), "be": number == 1}


def listing(items: Iterable[Object], *, places: bool) -> tuple[Item, ...]:
    """An enumeration of objects."""
    return tuple(Item(Category.of(item), item.cell if places else None) for item in items)


def fits(item: Object | None, values: Values) -> bool:
    """Whether everything that the values say of one object is true of `item`."""
    if item is None:
        return False
    truth = facts(item)
    phrases = [values[name] for name in ("a", "np") if name in values]
    named = [name for name in ("size", "colour", "shape", "place", "row", "column") if name in values]
    return all(phrase.matches(item) for phrase in phrases) and all(values[name] == truth[name] for name in named)


def true_of_subject(scene: Scene, asked: Values, values: Values) -> bool:
    """Everything said is true of the object asked about."""
    return fits(subject(scene, asked), values)


def true_of_place(scene: Scene, asked: Values, values: Values) -> bool:
    """The place named holds an object of which everything said is true."""
    return fits(at(values["place"], scene), values)


def true_count(scene: Scene, asked: Values, values: Values) -> bool:
    """Every tally is the scene's own, and "is" or "are" goes with the first."""
    tallies = [values[name] for name in ("tally", "tally2") if name in values]
    agrees = values.get("be") in (None, tallies[0][0] == 1)
    return agrees and all(len(category.among(scene)) == number for number, category in tallies)


def true_background(scene: Scene, asked: Values, values: Values) -> bool:
    """The background is the one named."""
    return values["background"] == scene.background


def enumerates(entries: tuple[Item, ...], items: list[Object]) -> bool:
    """Whether the entries name exactly these objects, each once."""
    places = all(entry.cell is not None for entry in entries)
    return Counter(entries) == Counter(listing(items, places=places))


def true_inventory(scene: Scene, asked: Values, values: Values) -> bool:
    """The list names every object of the scene."""
    return enumerates(values["list"], list(scene.objects))


BACKGROUND = sentences(
    true_background,
    "The background is {background}.",
    "Everything is drawn on a {background} background.",
    "All of this is set against a plain {background} background.",
)
TOTAL = sentences(
    true_count,
    "In total, the {picture} has {tally}.",
    "Altogether there {be} {tally} in this {picture}.",
    "The whole {picture} contains {tally}.",
)
SURROUNDINGS = (*BACKGROUND, *TOTAL)


def surroundings(scene: Scene, rng: Random) -> Said:
    """A sentence about the picture as a whole."""
    return rng.choice(SURROUNDINGS), {"background": scene.background, **tally(ANYTHING, scene)}


def descriptions(item: Object, scene: Scene, *, without: str = "") -> list[Category]:
    """The noun phrases that mean `item` and nothing else, leaving the attribute `without` unsaid."""
    values = [(None,) if name == without else (None, getattr(item, name)) for name in ("size", "colour", "shape")]
    phrases = (Category(*choice) for choice in product(*values))
    return [phrase for phrase in phrases if phrase != ANYTHING and the_only(phrase, scene) == item]


def describable(scene: Scene, rng: Random, *, without: str = "") -> tuple[Object, Category] | None:
    """A random object with a noun phrase that means it alone."""
    items = list(scene.objects)
    rng.shuffle(items)
    for item in items:
        if phrases := descriptions(item, scene, without=without):
            return item, rng.choice(phrases)
    return None
