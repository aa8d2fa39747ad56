"""Questions about one object: where it is, and what colour it has."""

from random import Random

from specvlm.demo.claims import (
    ANYTHING,
    SURROUNDINGS,
    Form,
    Said,
    describable,
    facts,
    has_one_of,
    questions,
    sentences,
    subject,
    surroundings,
    the_only,
    true_of_subject,
)
from specvlm.demo.scenes import Scene
from specvlm.demo.wording import Category, Sentence, Values


def _true_of_named(scene: Scene, asked: Values, values: Values) -> bool:
    """The phrase means the object asked about, and what is said is true of it."""
    item = subject(scene, asked)
    return item is not None and the_only(values["np"], scene) == item and true_of_subject(scene, asked, values)


_PLACES = sentences(
    _true_of_named,
    "The {np} is {place}.",
    "The {np} can be found {place}.",
    "You can find the {np} {place}.",
    "Look {place} and you will see the {np}.",
    "I see the {np} {place}.",
    "The {np} is located {place}.",
)
_DETAILS = sentences(
    true_of_subject,
    "It is {a}.",
    "It is {size} and {colour}.",
    "Its color is {colour}, and it is {size}.",
    "It is a {size} {shape}.",
)
_GRID = sentences(
    true_of_subject,
    "That is the {row} row and the {column} column.",
    "It belongs to the {row} row.",
    "This puts it in the {column} column.",
)


def _draw_where(scene: Scene, rng: Random) -> Values | None:
    found = describable(scene, rng)
    return None if found is None else {"np": found[1]}


def _where(scene: Scene, asked: Values, rng: Random) -> list[Said]:
    values = facts(subject(scene, asked)) | asked
    details = [(rng.choice(_DETAILS), values), (rng.choice(_GRID), values), surroundings(scene, rng)]
    return [(rng.choice(_PLACES), values), *rng.sample(details, rng.choice((1, 2, 2)))]


WHERE = Form(
    questions(
        "Where is the {np}?",
        "Where can I find the {np}?",
        "Where do you see the {np}?",
        "In which part of the {picture} is the {np}?",
        "What is the position of the {np}?",
        "Can you locate the {np} for me?",
    ),
    _draw_where,
    _where,
    (*_PLACES, *_DETAILS, *_GRID, *SURROUNDINGS),
    has_one_of(_PLACES),
)


_COLOURS = sentences(
    true_of_subject,
    "It is {colour}.",
    "Its color is {colour}.",
    "It looks {colour}.",
    "The {noun} is {colour}.",
)
_NAMED_COLOURS = sentences(
    _true_of_named,
    "The {np} is {colour}.",
    "The color of the {np} is {colour}.",
    "The {np} has the color {colour}.",
    "I would say that the {np} is {colour}.",
)
_POSITIONS = sentences(
    true_of_subject,
    "You find it {place}.",
    "It sits {place}.",
    "The {noun} {place} is {a}.",
    "{Place} there is {a}.",
)
_LOOKS = sentences(true_of_subject, "It is a {size} {shape}.", "It is {a}.", "The {noun} is {size}.")


def _draw_colour_of(scene: Scene, rng: Random) -> Values | None:
    found = describable(scene, rng, without="colour")
    return None if found is None else {"np": found[1]}


def _draw_colour_at(scene: Scene, rng: Random) -> Values:
    item = rng.choice(scene.objects)
    return {"np": rng.choice((ANYTHING, Category(shape=item.shape))), "place": item.cell}


def _colour_of(scene: Scene, asked: Values, rng: Random) -> list[Said]:
    core = rng.choice((*_NAMED_COLOURS, *_COLOURS))
    return _colour(core, scene, facts(subject(scene, asked)) | asked, rng)


def _colour_at(scene: Scene, asked: Values, rng: Random) -> list[Said]:
    return _colour(rng.choice(_COLOURS), scene, facts(subject(scene, asked)), rng)


def _colour(core: Sentence, scene: Scene, values: Values, rng: Random) -> list[Said]:
    position = rng.choice(_POSITIONS), values
    look = rng.choice(_LOOKS), values
    if rng.random() < 0.25:
        return [position, (core, values), rng.choice((look, surroundings(scene, rng)))]
    about = rng.sample([position, look], rng.choice((1, 2)))
    return [(core, values), *about, surroundings(scene, rng)]


_COLOUR_SENTENCES = (*_COLOURS, *_NAMED_COLOURS, *_POSITIONS, *_LOOKS, *SURROUNDINGS)
_names_colour = has_one_of((*_COLOURS, *_NAMED_COLOURS))

COLOUR_OF = Form(
    questions(
        "What color is the {np}?",
        "What colour does the {np} have?",
        "Which color is the {np}?",
        "Tell me the color of the {np}.",
        "Can you say what colour the {np} is?",
    ),
    _draw_colour_of,
    _colour_of,
    _COLOUR_SENTENCES,
    _names_colour,
)
COLOUR_AT = Form(
    questions(
        "What color is the {np} {place}?",
        "What colour does the {np} {place} have?",
        "Which color has the {np} {place}?",
        "Tell me the color of the {np} {place}.",
    ),
    _draw_colour_at,
    _colour_at,
    _COLOUR_SENTENCES,
    _names_colour,
)
