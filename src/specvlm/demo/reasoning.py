"""Yes-or-no questions about what there is, what it looks like and where it is: first the reason, then the verdict."""

from random import Random

from specvlm.demo.claims import (
    SURROUNDINGS,
    Form,
    Said,
    at,
    describable,
    enumerates,
    facts,
    has_one_of,
    listing,
    questions,
    sentences,
    subject,
    surroundings,
    tally,
    true_count,
    true_inventory,
    true_of_place,
    true_of_subject,
)
from specvlm.demo.scenes import CELLS, COLOURS, SHAPES, SIZES, Scene
from specvlm.demo.wording import Category, Sentence, Values


def _conclude(
    reasons: list[Said], verdicts: tuple[Sentence, ...], values: Values, scene: Scene, rng: Random
) -> list[Said]:
    """The verdict after its reasons, now and then with a word about the picture as a whole."""
    said = [*reasons, (rng.choice(verdicts), values)]
    return [*said, surroundings(scene, rng)] if rng.random() < 0.25 else said


_INVENTORY = sentences(
    true_inventory, "All I can see is {list}.", "The {picture} only shows {list}.", "What I see is {list}."
)


def _inventory(scene: Scene, rng: Random, *, places: bool = False) -> Said:
    return rng.choice(_INVENTORY), {"list": listing(scene.objects, places=places)}


# Is there such an object?


def _true_presence(scene: Scene, asked: Values, values: Values) -> bool:
    return values["verdict"] and values["tally"][1] == asked["a"] and true_count(scene, asked, values)


def _true_absence(scene: Scene, asked: Values, values: Values) -> bool:
    return not values["verdict"] and values["np"] == asked["a"] and not asked["a"].among(scene)


def _true_examples(scene: Scene, asked: Values, values: Values) -> bool:
    return enumerates(values["list"], asked["a"].among(scene))


_PRESENT = sentences(
    _true_presence,
    "So {verdict}, there {be} {tally}.",
    "The answer is {verdict}: there {be} {tally}.",
    "This means {verdict}, I can see {tally}.",
)
_ABSENT = sentences(
    _true_absence,
    "So {verdict}, there is no {np}.",
    "The answer is {verdict}: there is no {np}.",
    "This means {verdict}, I cannot find any {np}.",
)
_EXAMPLES = sentences(_true_examples, "I can see {list}.", "I notice {list}.", "There is {list}.")


def _draw_presence(scene: Scene, rng: Random) -> Values:
    item = rng.choice(scene.objects)
    named = rng.choice((("colour", "shape"), ("colour", "shape"), ("shape",), ("colour",), ("size", "shape")))
    phrase = Category(**{name: getattr(item, name) for name in named})
    if rng.random() < 0.55:
        choices = {"size": SIZES, "colour": tuple(COLOURS), "shape": SHAPES}
        changed = rng.choice(named)
        others = {name: getattr(item, name) for name in named} | {changed: rng.choice(choices[changed])}
        phrase = Category(**others)
    return {"a": phrase}


def _presence(scene: Scene, asked: Values, rng: Random) -> list[Said]:
    found = asked["a"].among(scene)
    if not found:
        absent = {"verdict": False, "np": asked["a"]}
        return _conclude([_inventory(scene, rng, places=rng.random() < 0.3)], _ABSENT, absent, scene, rng)
    examples = rng.choice(_EXAMPLES), {"list": listing(found, places=True)}
    return _conclude([examples], _PRESENT, {"verdict": True, **tally(asked["a"], scene)}, scene, rng)


PRESENCE = Form(
    questions(
        "Is there {a} in the {picture}?",
        "Can you see {a}?",
        "Does the {picture} contain {a}?",
        "Do you see {a} anywhere?",
    ),
    _draw_presence,
    _presence,
    (*_PRESENT, *_ABSENT, *_EXAMPLES, *_INVENTORY, *SURROUNDINGS),
    has_one_of((*_PRESENT, *_ABSENT), (*_EXAMPLES, *_INVENTORY)),
)

# Is anything there?


def _true_occupied(scene: Scene, asked: Values, values: Values) -> bool:
    return values["verdict"] and values["place"] == asked["place"] and true_of_place(scene, asked, values)


def _true_empty(scene: Scene, asked: Values, values: Values) -> bool:
    return not values["verdict"] and values["place"] == asked["place"] and at(values["place"], scene) is None


_OCCUPIED = sentences(
    _true_occupied,
    "{Place} I see {a}, so {verdict}.",
    "I see {a} {place}, so {verdict}.",
    "I notice {a} {place}, so the answer is {verdict}.",
)
_EMPTY = sentences(
    _true_empty, "So {verdict}, there is nothing {place}.", "The answer is {verdict}: there is nothing {place}."
)
_DETAILS = sentences(true_of_subject, "It is {size} and {colour}.", "It is a {size} {shape}.", "Its color is {colour}.")


def _draw_occupied(scene: Scene, rng: Random) -> Values:
    taken = [item.cell for item in scene.objects]
    free = [cell for cell in range(CELLS) if cell not in taken]
    return {"place": rng.choice(taken if rng.random() < 0.5 else free)}


def _occupied(scene: Scene, asked: Values, rng: Random) -> list[Said]:
    item = subject(scene, asked)
    if item is None:
        return _conclude([_inventory(scene, rng, places=True)], _EMPTY, {"verdict": False, **asked}, scene, rng)
    values = facts(item) | {"verdict": True}
    extra = [surroundings(scene, rng)] if rng.random() < 0.25 else []
    return [(rng.choice(_OCCUPIED), values), (rng.choice(_DETAILS), values), *extra]


OCCUPIED = Form(
    questions("Is there anything {place}?", "Do you see anything {place}?", "Is something {place}?"),
    _draw_occupied,
    _occupied,
    (*_OCCUPIED, *_EMPTY, *_DETAILS, *_INVENTORY, *SURROUNDINGS),
    has_one_of((*_OCCUPIED, *_EMPTY), (*_DETAILS, *_INVENTORY)),
)

# Is it of that colour, of that size, at that place? The asked value's slot ends in 2, the true one's does not.


def _true_verdict(scene: Scene, asked: Values, values: Values) -> bool:
    (name,) = (slot for slot in asked if slot.endswith("2"))
    truth = facts(subject(scene, asked))[name.removesuffix("2")] == asked[name]
    named = values.get("np", asked["np"]) == asked["np"] and values.get(name) == asked[name]
    return named and values["verdict"] == values["is"] == truth


_REASONS = {
    "colour": sentences(true_of_subject, "It is {colour}.", "Its color is {colour}.", "The {np} is {colour}."),
    "size": sentences(true_of_subject, "It is {size}.", "The {np} is {size}.", "It is a {size} one."),
    "place": sentences(true_of_subject, "It is {place}.", "I see it {place}.", "The {np} is {place}."),
}
_MORE = {
    "colour": sentences(true_of_subject, "You can find it {place}.", "It is {a} {place}.", "It sits {place}."),
    "size": sentences(true_of_subject, "You can find it {place}.", "It is {a} {place}.", "It sits {place}."),
    "place": sentences(true_of_subject, "It is {a}.", "That is the {row} row.", "It is {size} and {colour}."),
}
_VERDICTS = {
    name: sentences(
        _true_verdict,
        f"So {{verdict}}, the {{np}} {{is}} {{{name}2}}.",
        f"So {{verdict}}, it {{is}} {{{name}2}}.",
        f"The answer is {{verdict}}: it {{is}} {{{name}2}}.",
        f"This means {{verdict}}, the {{np}} {{is}} {{{name}2}}.",
    )
    for name in _REASONS
}


def _attribute_form(name: str, templates: tuple[Sentence, ...]) -> Form:
    slot = f"{name}2"
    choices = {"colour": tuple(COLOURS), "size": SIZES, "place": tuple(range(CELLS))}[name]

    def draw(scene: Scene, rng: Random) -> Values | None:
        found = describable(scene, rng, without=name)
        if found is None:
            return None
        truth = facts(found[0])[name]
        others = [value for value in choices if value != truth]
        return {"np": found[1], slot: truth if rng.random() < 0.5 else rng.choice(others)}

    def answer(scene: Scene, asked: Values, rng: Random) -> list[Said]:
        values = facts(subject(scene, asked)) | asked
        truth = values[name] == asked[slot]
        reason, more = (rng.choice(_REASONS[name]), values), (rng.choice(_MORE[name]), values)
        reasons = [reason, more] if rng.random() < 0.65 else [reason]
        return _conclude(reasons, _VERDICTS[name], values | {"verdict": truth, "is": truth}, scene, rng)

    return Form(
        templates,
        draw,
        answer,
        (*_VERDICTS[name], *_REASONS[name], *_MORE[name], *SURROUNDINGS),
        has_one_of(_VERDICTS[name], (*_REASONS[name], *_MORE[name])),
    )


HAS_COLOUR = _attribute_form(
    "colour",
    questions("Is the {np} {colour2}?", "Does the {np} look {colour2}?", "Is it true that the {np} is {colour2}?"),
)
HAS_SIZE = _attribute_form(
    "size",
    questions("Is the {np} {size2}?", "Does the {np} look {size2}?", "Would you call the {np} {size2}?"),
)
HAS_PLACE = _attribute_form(
    "place",
    questions("Is the {np} {place2}?", "Do you see the {np} {place2}?", "Is it true that the {np} is {place2}?"),
)
