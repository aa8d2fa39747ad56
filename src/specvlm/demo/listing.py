"""Questions that are answered by going through the objects: describe, and how many."""

from random import Random

from specvlm.demo.claims import (
    ANYTHING,
    BACKGROUND,
    SURROUNDINGS,
    Form,
    Said,
    enumerates,
    facts,
    listing,
    questions,
    sentences,
    surroundings,
    tally,
    true_count,
    true_inventory,
    true_of_place,
)
from specvlm.demo.scenes import COLOURS, SHAPES, SIZES, Object, Scene
from specvlm.demo.wording import Category, Sentence, Values


def _true_opening(scene: Scene, asked: Values, values: Values) -> bool:
    return true_count(scene, asked, values) and values.get("background", scene.background) == scene.background


_OPENINGS = sentences(
    _true_opening,
    "The {picture} shows {tally} on a {background} background.",
    "This {picture} contains {tally}.",
    "I can see {tally} in this {picture}.",
    "There {be} {tally} in the {picture}.",
    "On a {background} background there {be} {tally}.",
    "Looking at the {picture}, I notice {tally}.",
)
_ENTRIES = sentences(
    true_of_place,
    "There is {a} {place}.",
    "{Place} there is {a}.",
    "{A} sits {place}.",
    "{A} is placed {place}.",
    "I can see {a} {place}.",
    "{Place} you find {a}.",
    "{Place} I see a {shape}, which is {size} and {colour}.",
    "One of the {nouns} is a {shape} {place}. It is {colour} and {size}.",
)
_CLOSINGS = sentences(
    lambda scene, asked, values: True,
    "That is everything in the {picture}.",
    "Nothing else can be seen.",
    "The rest of the {picture} is empty.",
)


def _mentioned(said: list[Said], entries: tuple[Sentence, ...]) -> list[int]:
    return [values["place"] for sentence, values in said if sentence in entries]


def _describe(scene: Scene, asked: Values, rng: Random) -> list[Said]:
    entry = rng.choice(_ENTRIES)
    opening = rng.choice(_OPENINGS), {"background": scene.background, **tally(ANYTHING, scene)}
    closings = [(rng.choice(_CLOSINGS), {}), (rng.choice(BACKGROUND), {"background": scene.background})]
    return [
        opening,
        *((entry, facts(item)) for item in scene.objects),
        *rng.sample(closings, rng.choice((0, 1, 1)) if len(scene.objects) > 1 else 1),
    ]


def _all_described(scene: Scene, asked: Values, said: list[Said]) -> bool:
    return sorted(_mentioned(said, _ENTRIES)) == [item.cell for item in scene.objects]


DESCRIBE = Form(
    questions(
        "Describe the {picture}.",
        "What do you see?",
        "What is in this {picture}?",
        "Please describe everything in the {picture}.",
        "Can you describe this {picture} in detail?",
        "Tell me what the {picture} shows.",
        "List every {noun} and say where it is.",
        "What does this {picture} contain?",
        "Give a full description of the {picture}.",
    ),
    lambda scene, rng: {},
    _describe,
    (*_ENTRIES, *_OPENINGS, *_CLOSINGS, *BACKGROUND),
    _all_described,
)


def _group(scene: Scene, asked: Values) -> list[Object]:
    return asked["group"].among(scene)


def _true_number(scene: Scene, asked: Values, values: Values) -> bool:
    return values["number"] == len(_group(scene, asked))


def _true_answer(scene: Scene, asked: Values, values: Values) -> bool:
    return values["tally"][1] == asked["group"] and true_count(scene, asked, values)


def _true_list(scene: Scene, asked: Values, values: Values) -> bool:
    return enumerates(values["list"], _group(scene, asked))


def _true_member(scene: Scene, asked: Values, values: Values) -> bool:
    return true_of_place(scene, asked, values) and any(i.cell == values["place"] for i in _group(scene, asked))


_COUNTS = sentences(
    _true_answer,
    "There {be} {tally} in the {picture}.",
    "I count {tally}.",
    "The {picture} has {tally}.",
    "I can see {tally} here.",
    "You can count {tally} in this {picture}.",
)
_SUMS = (
    *sentences(
        _true_answer, "So there {be} {tally} in the {picture}.", "That makes {tally}.", "This adds up to {tally}."
    ),
    *sentences(_true_number, "So the answer is {number}.", "The total is {number}."),
)
_MEMBERS = sentences(
    _true_member, "There is {a} {place}.", "{Place} I see {a}.", "{A} is {place}.", "One is {a} {place}."
)
_LISTS = sentences(_true_list, "I can find {list}.", "Going through the {picture}, I see {list}.", "Here {be} {list}.")
_INSTEAD = sentences(
    true_inventory, "All I can see is {list}.", "The {picture} only shows {list}.", "Instead there is {list}."
)


def _draw_group(scene: Scene, rng: Random) -> Values:
    item = rng.choice(scene.objects)
    if rng.random() < 0.2:
        item = Object(rng.choice(SIZES), rng.choice(tuple(COLOURS)), rng.choice(SHAPES), item.cell)
    groups = (ANYTHING, Category(colour=item.colour), Category(shape=item.shape))
    return {"group": rng.choices(groups, weights=(2, 4, 4))[0]}


def _count(scene: Scene, asked: Values, rng: Random) -> list[Said]:
    group = _group(scene, asked)
    number: Values = {"number": len(group), **tally(asked["group"], scene)}
    if not group:
        reason = rng.choice(_INSTEAD), {"list": listing(scene.objects, places=rng.random() < 0.5)}
        return [(rng.choice(_COUNTS), number), reason]
    if rng.random() < 0.5:
        member = rng.choice(_MEMBERS)
        members: list[Said] = [(member, facts(item)) for item in group]
    else:
        members = [(rng.choice(_LISTS), {"list": listing(group, places=True), "be": len(group) == 1})]
    if rng.random() < 0.75:
        return [*members, (rng.choice(_SUMS), number)]
    extra = [surroundings(scene, rng)] if rng.random() < 0.4 and asked["group"] != ANYTHING else []
    return [(rng.choice(_COUNTS), number), *members, *extra]


def _counted(scene: Scene, asked: Values, said: list[Said]) -> bool:
    answered = any(sentence in (*_COUNTS, *_SUMS) for sentence, _ in said)
    cells = _mentioned(said, _MEMBERS)
    return answered and (not cells or sorted(cells) == [item.cell for item in _group(scene, asked)])


COUNT = Form(
    questions(
        "How many {group} are there?",
        "How many {group} can you see?",
        "How many {group} does the {picture} show?",
        "Count the {group} in this {picture}.",
        "What is the number of {group} in the {picture}?",
        "Can you tell me how many {group} are in the {picture}?",
    ),
    _draw_group,
    _count,
    (*_COUNTS, *_SUMS, *_MEMBERS, *_LISTS, *_INSTEAD, *SURROUNDINGS),
    _counted,
)
