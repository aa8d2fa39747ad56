"""Speed by the acceptance: a draft that costs what an EAGLE head costs, knows the answer, and lies at a set rate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.decode import speeds
from bench.decode.figures import Figure, Kind, Teller
from bench.decode.models import Subject
from bench.decode.run import Run
from specvlm.drafts import DraftSession, EagleDraft
from specvlm.state import DecodeState
from specvlm.targets.base import Prompt, Target
from specvlm.tree import DraftTree, Plan, tree_from_lists

SECTION = "replay"

#: What published systems accept on LLaVA when greedy: tokens a round, bonus included.
PUBLISHED = {
    "EagleVLM, 1.5-7B": 3.59,
    "SpecVLM, 1.5-7B": 3.67,
    "ViSpec, 1.6-7B": 3.98,
    "SpecVLM, 1.6-13B": 4.15,
}
#: The tau that targets are set at.
AIM = 4.8
TAUS = (1.0, 2.0, 3.0, 4.0, AIM, 6.0)

#: The golden ratio's fraction, whose multiples fill [0, 1) evenly however many there are.
_GOLDEN = (5**0.5 - 1) / 2


def name_of(tau: float, head: str) -> str:
    """The figure of a speed."""
    return f"tau {tau:g}, {head}"


def over_ar(tau: float, head: str) -> str:
    """The figure of a speedup over AR by the same engine."""
    return f"{name_of(tau, head)}, over AR"


def over_hf(tau: float, head: str) -> str:
    """The figure of a speedup over transformers."""
    return f"{name_of(tau, head)}, over {speeds.HF_EAGER}"


def replayed(run: Run) -> Iterator[Figure]:
    """Speedups: at the tau that has targets with every head, then along the curve with the last of them."""
    subject = run.subject
    taus = [AIM, *(tau for tau in TAUS if tau != AIM)]
    *others, last = subject.drafts
    answer = subject.model.generate(**subject.asked, draft=None).tokens
    conditions = [(taus[0], head) for head in (last, *others)] + [(tau, last) for tau in taus[1:]]
    for tau, head in conditions:
        if tau > 1 + subject.size.plan.depth:
            continue
        draft = ReplayDraft(subject.drafts[head], script_of(answer, tau, subject))
        yield from _speedups(run, tau, head, draft, answer)


def _speedups(run: Run, tau: float, head: str, draft: "ReplayDraft", answer: Sequence[int]) -> Iterator[Figure]:
    """Speeds with a draft and without, in turn."""
    subject, rates, ratios = run.subject, [], []
    tell = Teller(Kind.REPLAYED, subject.size.name, SECTION)
    for repeat in range(1 + (subject.size.answers + 1) // 2):
        found = subject.model.generate(**subject.asked, draft=draft)
        if found.tokens != answer:
            raise RuntimeError(f"{name_of(tau, head)}: expected the answer without a draft, got another")
        if repeat:  # in the first, steps are recorded
            plain = subject.model.generate(**subject.asked, draft=None).stats
            rates.append(found.stats.tokens_per_second)
            ratios.append(found.stats.tokens_per_second / plain.tokens_per_second)
    measured = {"tau": found.stats.tau, "rounds": found.stats.rounds}
    yield tell.many(name_of(tau, head), "tokens/s", rates, **measured)
    yield tell.many(over_ar(tau, head), "x", ratios, **measured)
    if eager := run.found.value(subject.size.name, speeds.SECTION, speeds.HF_EAGER):
        yield tell.many(over_hf(tau, head), "x", [rate / eager for rate in rates], **measured)


@dataclass(frozen=True, slots=True, eq=False)
class Script:
    """Trees that know an answer, by the position of their root.

    Attributes:
        tree: their shape.
        rows: [P, N] int64 their tokens; where no round begins, all are wrong.
        lengths: how many tokens the rounds accept, in order.
    """

    tree: DraftTree
    rows: Tensor
    lengths: tuple[int, ...]


class ReplayDraft:
    """Grows a head's trees and lets them go: what is verified is a script's.

    Args:
        inner: whose cost it has; its trees are as large and as deep as the script's.
        script: of one answer, to one prompt.
    """

    def __init__(self, inner: EagleDraft, script: Script) -> None:
        self._inner, self._script = inner, script

    @property
    def taps(self) -> tuple[int, ...] | None:
        """The head's."""
        return self._inner.taps

    def bind(self, target: Target) -> None:
        """As the head."""
        self._inner.bind(target)

    def start(self, prompt: Prompt, state: DecodeState) -> DraftSession:
        """A session of the head's, whose trees are replaced."""
        return ReplaySession(self._inner.start(prompt, state), self._script)


class ReplaySession:
    """A head's session whose trees are replaced on the device, by a step that is recorded like any other."""

    def __init__(self, inner: DraftSession, script: Script) -> None:
        self._inner, self._script = inner, script

    def propose(self, state: DecodeState) -> DraftTree:
        """The script's tree for where the root stands, when the head's has grown."""
        self._inner.propose(state)
        script, tree = self._script, self._script.tree

        def replaced() -> tuple[Tensor | int, ...]:
            tokens = script.rows.index_select(0, state.kv_len)
            return tokens, tree.parents, tree.depths, tree.scores, tree.max_depth

        reads = script.rows, tree.parents, tree.depths, tree.scores, state.kv_len
        return DraftTree(*state.desk.run("replayed tree", replaced, reads, into="tree"))


def script_of(answer: Sequence[int], tau: float, subject: Subject) -> Script:
    """A script by which rounds emit `tau` tokens on average, cut at the end of the answer."""
    plan, spec = subject.size.plan, subject.model.target.spec
    return script(answer, accepted(tau, plan.depth), plan, subject.size.prompt_tokens, spec.vocab_size, subject.device)


def script(
    answer: Sequence[int], lengths: Iterator[int], plan: Plan, prompt: int, vocabulary: int, device: torch.device
) -> Script:
    """A script for an answer to a prompt of so many tokens.

    Its trees are a chain that says what the answer says until it lies; the other nodes are the chain's wrong siblings.
    """
    parents = [-1, *range(plan.depth)]
    parents += [node % plan.depth for node in range(plan.nodes - len(parents))]
    depth_of = [0, *(parent + 1 for parent in parents[1:])]  # a parent is the root or on the chain: its index
    tree = tree_from_lists([0] * plan.nodes, parents, device=device)

    def tokens_at(said: int, length: int) -> list[int]:
        known = [*answer, *[0] * plan.depth]
        right = [known[said - 1 + depth] for depth in depth_of]
        return [token if node <= length else (token + node) % vocabulary for node, token in enumerate(right)]

    rows = [tokens_at(said, 0) for said in range(1, len(answer) + 1)]
    said, taken = 1, []
    while said < len(answer):
        taken.append(min(next(lengths), len(answer) - said))
        rows[said - 1] = tokens_at(said, taken[-1])
        said += taken[-1] + 1
    return Script(tree, torch.tensor([[0] * plan.nodes] * prompt + rows, device=device), tuple(taken))


def accepted(tau: float, depth: int) -> Iterator[int]:
    """Accepted lengths, round after round, of a draft whose every token is right at the same rate, given its parent.

    P(length >= d) = rate^d up to the depth, spread as evenly as can be, so that few rounds have the average that many
    have.
    """
    rate = rate_for(tau, depth)
    number = 0
    while True:
        at = (0.5 + number * _GOLDEN) % 1
        yield sum(at < rate**level for level in range(1, depth + 1))
        number += 1


def rate_for(tau: float, depth: int) -> float:
    """The rate at which a draft's tokens are right where rounds emit `tau` tokens: 1 + rate + ... + rate^depth.

    Raises:
        ValueError: no rate gives that.
    """
    if not 1 <= tau <= depth + 1:
        raise ValueError(f"tau: expected 1 to {depth + 1}, got {tau}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(middle**level for level in range(depth + 1)) < tau:
            low = middle
        else:
            high = middle
    return high
