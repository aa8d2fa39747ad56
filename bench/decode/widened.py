"""Speed by a real acceptance: the model that ships and its head, widened to a large model's shape."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.decode import memory
from bench.decode.figures import Figure, Kind, Teller
from bench.decode.models import drafts_of, dtype_on, recorded
from bench.decode.run import Run
from bench.widening import widened, widened_head
from specvlm import SpecVLM, load
from specvlm.decoder import Answer
from specvlm.demo.run import tasks
from specvlm.drafts import EagleDraft

SECTION = "widened"
AR, EQUAL = "AR", "answers equal to the small model's"


def over_ar(head: str) -> str:
    """The figure of a speedup."""
    return f"{head}, over AR"


def widened_demo(run: Run) -> Iterator[Figure]:
    """Answers of the widened model with its head and without, in turn, and whether they are the small model's.

    In fp32 they are, up to near-ties; in bf16 a near-tie may well flip, so equality is told and not asked for.
    """
    size, device = run.subject.size, run.subject.device
    tell = Teller(Kind.WIDENED, size.name, SECTION)
    memory.begin()
    small, made = load("demo", device=device, dtype="float32"), {"device": device, "dtype": dtype_on(device)}
    wide, _ = recorded(widened(small.target.model, size.widened, **made))
    proposable = max(size.proposable, small.target.spec.vocab_size)  # the fillers among them are never proposed
    drafts = drafts_of(wide, widened_head(small.draft.head, size.widened, **made), size.plan, proposable)
    asked = [
        small.prepare(task.picture, task.question) | {"max_new_tokens": size.tokens} for task in tasks(size.answers)
    ]
    expected = [small.generate(**each, draft=None).tokens for each in asked]

    passes = [_answers(wide, asked, drafts) for _ in range(1 + (size.answers + 1) // 2)][1:]
    plain = [found[None] for found in passes]
    equal = sum(one.tokens == other for one, other in zip(plain[0], expected, strict=True))
    yield tell.one(EQUAL, f"of {len(asked)}", equal, dtype=str(made["dtype"]).removeprefix("torch."))
    yield tell.many(AR, "tokens/s", [_rate(answers) for answers in plain])
    for name in drafts:
        mine = [found[name] for found in passes]
        if any(one.tokens != other.tokens for one, other in zip(mine[0], plain[0], strict=True)):
            raise RuntimeError(f"widened demo, {name}: expected the answers without a draft, got others")
        rounds = sum(answer.stats.rounds for answer in mine[0])
        tau = sum(answer.stats.tau * answer.stats.rounds for answer in mine[0]) / rounds
        yield tell.many(name, "tokens/s", [_rate(answers) for answers in mine], tau=tau, rounds=rounds)
        ratios = [_rate(answers) / _rate(others) for answers, others in zip(mine, plain, strict=True)]
        yield tell.many(over_ar(name), "x", ratios, tau=tau)


def _answers(
    model: SpecVLM, asked: Sequence[Mapping[str, Any]], drafts: Mapping[str, EagleDraft]
) -> dict[str | None, list[Answer]]:
    """All answers, without a draft under the name None, and with each."""
    by_name: dict[str | None, EagleDraft | None] = {None: None, **drafts}
    return {name: [model.generate(**each, draft=draft) for each in asked] for name, draft in by_name.items()}


def _rate(answers: Sequence[Answer]) -> float:
    """Tokens a second, decode only."""
    stats = [answer.stats for answer in answers]
    return sum(one.tokens - 1 for one in stats) / sum(one.decode_seconds for one in stats)
