"""Questions about scenes, answers to them, and a judge of answers.

`ask` writes a question and one of its many right answers. `check` reads any answer that the grammar could
have written: every sentence has to parse, every claim has to hold, and the answer has to be complete.
"""

from random import Random

from specvlm.demo import judging, listing, locating, reasoning
from specvlm.demo.claims import Form, Said, applies
from specvlm.demo.scenes import Scene
from specvlm.demo.wording import Sentence, Style, Values

FORMS: dict[str, tuple[Form, ...]] = {
    "describe": (listing.DESCRIBE,),
    "count": (listing.COUNT,),
    "where": (locating.WHERE,),
    "colour": (locating.COLOUR_OF, locating.COLOUR_AT),
    "compare": (judging.WHICH_BIGGER, judging.IS_BIGGER, judging.WHICH_MORE, judging.MORE_THAN),
    "yes_no": (
        reasoning.PRESENCE,
        reasoning.OCCUPIED,
        reasoning.HAS_COLOUR,
        reasoning.HAS_SIZE,
        reasoning.HAS_PLACE,
    ),
}
TYPES = tuple(FORMS)
_TRIES = 20


def ask(scene: Scene, kind: str, rng: Random) -> tuple[str, str] | None:
    """A question of type `kind` about the scene and a right answer, each in words drawn at random.

    None where the scene does not lend itself to the type: one object cannot be compared.
    """
    for _ in range(_TRIES):
        form = rng.choice(FORMS[kind])
        asked = form.draw(scene, rng)
        if asked is not None:
            question = rng.choice(form.questions).say(asked, Style.draw(rng))
            return question, answer(scene, form, asked, rng)
    return None


def answer(scene: Scene, form: Form, asked: Values, rng: Random) -> str:
    """One right answer; its words stay the same from sentence to sentence."""
    style = Style.draw(rng)
    return " ".join(sentence.say(values, style) for sentence, values in form.answer(scene, asked, rng))


def check(scene: Scene, kind: str, question: str, text: str) -> bool:
    """Whether `text` answers the question with nothing but the truth about the scene, and completely.

    Raises:
        ValueError: the grammar has no such question of type `kind`.
    """
    form, asked = _read_question(kind, question)
    if not applies(asked, scene):
        return False
    said = _read_answer(form.sentences, text)
    return (
        said is not None
        and all(sentence.claim(scene, asked, values) for sentence, values in said)
        and form.complete(scene, asked, said)
    )


def _read_question(kind: str, text: str) -> tuple[Form, Values]:
    for form in FORMS[kind]:
        for question in form.questions:
            match = question.read(text)
            if match is not None and match[1] == len(text):
                return form, match[0]
    raise ValueError(f"question: expected one that the grammar asks for type {kind!r}, got {text!r}")


def _read_answer(known: tuple[Sentence, ...], text: str) -> list[Said] | None:
    """Split an answer into the sentences it was made of, longest first; None where some part is not known."""
    said: list[Said] = []
    start = 0
    while start < len(text):
        matches = [(sentence, match) for sentence in known if (match := sentence.read(text, start))]
        if not matches:
            return None
        sentence, (values, start) = max(matches, key=lambda found: found[1][1])
        said.append((sentence, values))
    return said
