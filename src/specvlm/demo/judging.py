"""Comparisons, of two objects in size and of two groups in number: first the facts, then the verdict."""

from random import Random
from typing import cast

from specvlm.demo.claims import (
    SURROUNDINGS,
    Form,
    Said,
    descriptions,
    enumerates,
    facts,
    fits,
    has_one_of,
    listing,
    questions,
    sentences,
    surroundings,
    tally,
    the_only,
    true_count,
)
from specvlm.demo.scenes import COLOURS, SHAPES, SIZES, Object, Scene
from specvlm.demo.wording import Category, Values

# Which of two objects is larger.


def _pair(scene: Scene, asked: Values) -> tuple[Object, Object]:
    """The two that are compared: a question that applies names one object each."""
    return cast(Object, the_only(asked["np"], scene)), cast(Object, the_only(asked["np2"], scene))


def _true_size(scene: Scene, asked: Values, values: Values) -> bool:
    item = the_only(values["np"], scene)
    return item in _pair(scene, asked) and fits(item, values)


def _true_sizes(scene: Scene, asked: Values, values: Values) -> bool:
    first, second = _pair(scene, asked)
    named = the_only(values["np"], scene), the_only(values["np2"], scene)
    return named == (first, second) and (first.size, second.size) == (values["size"], values["size2"])


def _true_bigger(scene: Scene, asked: Values, values: Values) -> bool:
    first, second = _pair(scene, asked)
    winner = first if first.size == values["bigger"] else second
    return first.size != second.size and the_only(values["np"], scene) == winner


def _true_relation(scene: Scene, asked: Values, values: Values) -> bool:
    first, second = _pair(scene, asked)
    truth = first.size != second.size and first.size == asked["bigger"]
    same_words = all(values[name] == asked[name] for name in ("np", "np2", "bigger"))
    return same_words and values["verdict"] == values["is"] == truth


_SIZE_FACTS = sentences(_true_size, "The {np} {place} is {size}.", "The {np} is {place} and it is {size}.")
_SIZE_PAIRS = sentences(
    _true_sizes,
    "The {np} is {size} and the {np2} is {size2}.",
    "I see that the {np} is {size}, while the {np2} is {size2}.",
)
_BIGGER = sentences(
    _true_bigger,
    "So the {np} is {bigger}.",
    "So the {np} is the {bigger} one.",
    "The {bigger} one of the two is the {np}.",
)
_RELATION = sentences(
    _true_relation,
    "So {verdict}, the {np} {is} {bigger} than the {np2}.",
    "The answer is {verdict}: the {np} {is} {bigger} than the {np2}.",
)


def _draw_pair(scene: Scene, rng: Random) -> Values | None:
    named = [(item, descriptions(item, scene, without="size")) for item in scene.objects]
    named = [(item, phrases) for item, phrases in named if phrases]
    if len(named) < 2:
        return None
    (first, phrases), (second, phrases2) = rng.sample(named, 2)
    if first.size == second.size and rng.random() < 0.4:
        return None
    return {"np": rng.choice(phrases), "np2": rng.choice(phrases2), "bigger": "large"}


def _draw_unequal_pair(scene: Scene, rng: Random) -> Values | None:
    asked = _draw_pair(scene, rng)
    if asked is None:
        return None
    first, second = _pair(scene, asked)
    return None if first.size == second.size else asked | {"bigger": rng.choice(SIZES)}


def _size_facts(scene: Scene, asked: Values, rng: Random) -> list[Said]:
    first, second = _pair(scene, asked)
    if rng.random() < 0.3:
        sizes = {"size": first.size, "size2": second.size}
        return [(rng.choice(_SIZE_PAIRS), asked | sizes)]
    fact = rng.choice(_SIZE_FACTS)
    return [(fact, facts(first) | {"np": asked["np"]}), (fact, facts(second) | {"np": asked["np2"]})]


def _concluded(reasons: list[Said], verdict: Said, scene: Scene, rng: Random) -> list[Said]:
    return [*reasons, verdict, *([surroundings(scene, rng)] if rng.random() < 0.3 else [])]


def _choose_bigger(scene: Scene, asked: Values, rng: Random) -> list[Said]:
    first, _ = _pair(scene, asked)
    winner = "np" if first.size == asked["bigger"] else "np2"
    verdict = rng.choice(_BIGGER), {"np": asked[winner], "bigger": asked["bigger"]}
    return _concluded(_size_facts(scene, asked, rng), verdict, scene, rng)


def _is_bigger(scene: Scene, asked: Values, rng: Random) -> list[Said]:
    first, second = _pair(scene, asked)
    truth = first.size != second.size and first.size == asked["bigger"]
    verdict = rng.choice(_RELATION), asked | {"verdict": truth, "is": truth}
    return _concluded(_size_facts(scene, asked, rng), verdict, scene, rng)


WHICH_BIGGER = Form(
    questions(
        "Which one is {bigger}, the {np} or the {np2}?",
        "What is {bigger}, the {np} or the {np2}?",
        "Of the {np} and the {np2}, which is {bigger}?",
    ),
    _draw_unequal_pair,
    _choose_bigger,
    (*_BIGGER, *_SIZE_FACTS, *_SIZE_PAIRS, *SURROUNDINGS),
    has_one_of(_BIGGER),
)
IS_BIGGER = Form(
    questions(
        "Is the {np} {bigger} than the {np2}?",
        "Does the {np} look {bigger} than the {np2}?",
        "Would you say that the {np} is {bigger} than the {np2}?",
    ),
    _draw_pair,
    _is_bigger,
    (*_RELATION, *_SIZE_FACTS, *_SIZE_PAIRS, *SURROUNDINGS),
    has_one_of(_RELATION),
)

# Which of two groups is more numerous.


def _numbers(scene: Scene, asked: Values) -> tuple[int, int]:
    return len(asked["group"].among(scene)), len(asked["group2"].among(scene))


def _true_tally(scene: Scene, asked: Values, values: Values) -> bool:
    group = values["tally"][1]
    listed = "list" not in values or enumerates(values["list"], group.among(scene))
    return group in (asked["group"], asked["group2"]) and listed and true_count(scene, asked, values)


def _true_more(scene: Scene, asked: Values, values: Values) -> bool:
    first, second = _numbers(scene, asked)
    return first != second and values["group"] == asked["group" if first > second else "group2"]


def _true_equal(scene: Scene, asked: Values, values: Values) -> bool:
    first, second = _numbers(scene, asked)
    return first == second == values.get("number", first)


def _true_excess(scene: Scene, asked: Values, values: Values) -> bool:
    first, second = _numbers(scene, asked)
    same_words = all(values[name] == asked[name] for name in ("group", "group2"))
    return same_words and values["verdict"] == (first > second)


_TALLIES = sentences(
    _true_tally,
    "I see {list}, which makes {tally}.",
    "I can find {list}, that is {tally}.",
    "I notice {list}: that is {tally}.",
)
_NONE = sentences(_true_tally, "There {be} {tally}.", "I see {tally}.", "I can find {tally}.")
_MORE = sentences(
    _true_more, "So there are more {group}.", "So the {group} win.", "This means that the {group} are more numerous."
)
_EQUAL = sentences(_true_equal, "So there are equally many.", "So their numbers are equal.", "So it is a tie.")
_MORE_YES = sentences(
    lambda scene, asked, values: values["verdict"] and _true_excess(scene, asked, values),
    "So {verdict}, there are more {group} than {group2}.",
    "The answer is {verdict}: there are more {group} than {group2}.",
)
_MORE_NO = sentences(
    lambda scene, asked, values: not values["verdict"] and _true_excess(scene, asked, values),
    "So {verdict}, there are not more {group} than {group2}.",
    "The answer is {verdict}: there are not more {group} than {group2}.",
)


def _draw_groups(scene: Scene, rng: Random) -> Values | None:
    name, values = rng.choice((("colour", tuple(COLOURS)), ("shape", SHAPES)))
    present = sorted({getattr(item, name) for item in scene.objects})
    first = rng.choice(present)
    rest = [value for value in (present if rng.random() < 0.8 else values) if value != first]
    if not rest:
        return None
    pair = [first, rng.choice(rest)]
    groups = [Category(**{name: value}) for value in rng.sample(pair, 2)]
    even = len(groups[0].among(scene)) == len(groups[1].among(scene))
    return None if even and rng.random() < 0.5 else {"group": groups[0], "group2": groups[1]}


def _tallies(scene: Scene, asked: Values, rng: Random) -> list[Said]:
    frame, none = rng.choice(_TALLIES), rng.choice(_NONE)
    return [
        (frame if (found := group.among(scene)) else none, tally(group, scene) | {"list": listing(found, places=True)})
        for group in (asked["group"], asked["group2"])
    ]


def _which_more(scene: Scene, asked: Values, rng: Random) -> list[Said]:
    first, second = _numbers(scene, asked)
    if first == second:
        verdict: Said = rng.choice(_EQUAL), {}
    else:
        verdict = rng.choice(_MORE), {"group": asked["group" if first > second else "group2"]}
    return _concluded(_tallies(scene, asked, rng), verdict, scene, rng)


def _more_than(scene: Scene, asked: Values, rng: Random) -> list[Said]:
    first, second = _numbers(scene, asked)
    truth = first > second
    verdict = rng.choice(_MORE_YES if truth else _MORE_NO), asked | {"verdict": truth}
    return _concluded(_tallies(scene, asked, rng), verdict, scene, rng)


WHICH_MORE = Form(
    questions(
        "Are there more {group} or more {group2}?",
        "Of which are there more, {group} or {group2}?",
        "Do you see more {group} or more {group2}?",
    ),
    _draw_groups,
    _which_more,
    (*_MORE, *_EQUAL, *_TALLIES, *_NONE, *SURROUNDINGS),
    has_one_of((*_MORE, *_EQUAL)),
)
MORE_THAN = Form(
    questions(
        "Are there more {group} than {group2}?",
        "Does the {picture} have more {group} than {group2}?",
        "Do the {group} outnumber the {group2}?",
    ),
    _draw_groups,
    _more_than,
    (*_MORE_YES, *_MORE_NO, *_TALLIES, *_NONE, *SURROUNDINGS),
    has_one_of((*_MORE_YES, *_MORE_NO)),
)
