"""The tree that is worth its time: depth and size by the machine's own costs and the draft's own record.

    tokens a second = tau(nodes, depth) / (verify(nodes) + depth * level)

The costs are measured once for a target and a draft (`costs_of`); tau follows from how often the target has drawn the
draft's best child, its second best, and so on, at each depth. Where no tree beats a step without one, nothing is
drafted, but for a look now and then whether that has changed.
"""

import contextlib
import copy
import hashlib
import heapq
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from specvlm.checks import check_int, check_number
from specvlm.files import whole
from specvlm.policies import Eagle2, History, Outcome, TreePolicy
from specvlm.state import Limits, Sampling
from specvlm.targets.base import Target
from specvlm.tree import BUCKETS, Plan, tree_from_lists

_PROMPT, _REPEATS, _DEPTH = 64, 15, 4
_PRIOR_TRIALS = 1.0
_PRIORS = 0.9, 0.3  # that a best child is drawn, or a later one that has its turn: or no draft would ever be tried
_MEMORY = 0.99  # of a trial when the next one comes
_SHALLOW = 2  # levels of the first trees


@dataclass(frozen=True, slots=True)
class Costs:
    """What a round's parts take on one machine, in seconds.

    Attributes:
        verify: the target's forward by the tree's bucket; 1, a step without a draft, is among them, and one more.
        level: one level of the draft: a forward and the choice of children.

    Raises:
        ValueError: buckets that there are not, or too few; a time that is no finite number above 0.
    """

    verify: Mapping[int, float]
    level: float

    def __post_init__(self) -> None:
        if 1 not in self.verify or len(self.verify) < 2 or not set(self.verify) <= set(BUCKETS):
            raise ValueError(f"verify: expected times for two or more of {BUCKETS}, 1 included, got {set(self.verify)}")
        if not all(math.isfinite(time) and time > 0 for time in (*self.verify.values(), self.level)):
            raise ValueError(f"costs: expected finite times above 0, got {dict(self.verify)} and {self.level}")

    @property
    def plausible(self) -> bool:
        """Whether no tree takes much less time than a smaller one, as none does on a machine that is left alone."""
        times = [self.verify[nodes] for nodes in sorted(self.verify)]
        return all(later > 0.8 * max(times[:place]) for place, later in enumerate(times[1:], start=1))

    def seconds(self, nodes: int, depth: int) -> float:
        """A round with a tree of a bucket of `nodes`, grown over `depth` levels."""
        return self.verify[nodes] + depth * self.level


class Rates:
    """How often the target drew a node's child of each rank, by the child's depth; old trials fade.

    A rank is tried where no better one was drawn, so a depth's rates never sum to more than 1.

    Args:
        depth: the deepest to keep count of.
        width: ranks to keep count of.
    """

    def __init__(self, depth: int, width: int) -> None:
        self.depth, self.width = depth, width
        self._hits = [[_PRIOR_TRIALS * _PRIORS[rank > 0] for rank in range(width)] for _ in range(depth)]
        self._trials = [[_PRIOR_TRIALS] * width for _ in range(depth)]

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Takes in what the target did at the nodes of a round's walk."""
        for outcome in outcomes:
            if outcome.depth > self.depth:
                break
            hits, trials = self._hits[outcome.depth - 1], self._trials[outcome.depth - 1]
            for rank in range(min(outcome.children, self.width)):
                hits[rank] = _MEMORY * hits[rank] + (rank == outcome.rank)
                trials[rank] = _MEMORY * trials[rank] + 1
                if rank == outcome.rank:
                    break

    def rate(self, depth: int, rank: int) -> float:
        """Share of the nodes at `depth` - 1 whose draw is the child of that rank."""
        shares = [hit / tried for hit, tried in zip(self._hits[depth - 1], self._trials[depth - 1], strict=True)]
        return shares[rank] * math.prod(1 - share for share in shares[:rank])

    def lengths(self, depth: int, nodes: int) -> list[float]:
        """Expected accepted tokens of the best trees of 0, 1, ... `nodes` drafted nodes, `depth` deep at most.

        A node is accepted when every rank on its path is drawn; the best tree holds the likeliest nodes, of those that
        grow: on every level the likeliest `width` nodes get children.
        """
        # Ranks in the order of their rates, so that a node's successors are its first child and its next sibling.
        rates = [
            sorted((self.rate(level, rank) for rank in range(self.width)), reverse=True)
            for level in range(1, depth + 1)
        ]
        heap = [(-rates[0][0], 1, 0, 1.0)]
        found = [0.0]
        expanded = [0] * depth  # nodes come out of the heap best first, which on a level is the order of the beam
        while len(found) <= nodes and heap:
            negative, level, rank, above = heapq.heappop(heap)
            found.append(found[-1] - negative)
            if rank + 1 < self.width:
                heapq.heappush(heap, (-above * rates[level - 1][rank + 1], level, rank + 1, above))
            if level < depth and expanded[level] < self.width:
                expanded[level] += 1
                heapq.heappush(heap, (negative * rates[level][0], level + 1, 0, -negative))
        return found + [found[-1]] * (nodes + 1 - len(found))


def best_shape(costs: Costs, rates: Rates, depths: int | None = None) -> tuple[int, int]:
    """The bucket of nodes and the depth of the most tokens a second; (1, 0): no draft. Ties go to the smaller.

    Args:
        depths: the most; None: as many as `rates` keeps count of.
    """
    best, best_speed = (1, 0), 1 / costs.verify[1]
    for depth in range(1, (depths or rates.depth) + 1):
        lengths = rates.lengths(depth, max(costs.verify) - 1)
        for nodes in sorted(set(costs.verify) - {1}):
            speed = (1 + lengths[nodes - 1]) / costs.seconds(nodes, depth)
            if speed > best_speed:
                best, best_speed = (nodes, depth), speed
    return best


class CostAware(TreePolicy):
    """Takes the shape of the most tokens a second, and drafts nothing where that is faster.

    It begins with shallow trees and goes deeper as they come out, so that a useless draft is found out soon. Now and
    then it looks: a tree a level deeper than decided, or of the first level where nothing was to be drafted, is how it
    learns that more would pay again. A look that came out is followed by another where two tokens for its time are a
    gain. What it learns serves the next answer too; one instance belongs to one draft on one target.

    Args:
        costs: of the target and the draft on this machine: `costs_of(target, draft)`.
        depth: the most levels.
        width: nodes expanded a level, and children of each.
        review: rounds between two decisions; the first ones are taken every round.
        looks: the share of the time that looks which bring nothing may take.

    Raises:
        ValueError: a number out of its range, or levels that together hold more nodes than a slab has room for.
        TypeError: no costs, or a number that is none.
    """

    def __init__(self, costs: Costs, *, depth: int = 8, width: int = 4, review: int = 8, looks: float = 0.01) -> None:
        if not isinstance(costs, Costs):
            raise TypeError(f"costs: expected Costs, as costs_of gives them, got {costs!r}")
        for name, value in (("depth", depth), ("review", review)):
            check_int(name, value, low=1)
        check_number("looks", looks)
        if not (math.isfinite(looks) and looks > 0):
            raise ValueError(f"looks: expected a finite number > 0, got {looks}")
        Plan(BUCKETS[-1], depth, width)
        self.costs, self.rates = costs, Rates(depth, width)
        self._review, self._looks = review, looks
        self._rounds = self._next_look = 0
        self._shape = (1, 0)
        self._reach = min(_SHALLOW, depth)  # how deep a decision may go
        self._grown, self._looked = 0, False  # how deep the last round's tree was, and whether it was a look

    def plan(self, history: History) -> Plan:
        """The shape decided at the last review, or now and then one a level deeper."""
        outcomes = history.outcomes()
        self.rates.add(outcomes)
        came_out = 0 < self._grown == len(outcomes) and outcomes[-1].rank is not None
        if came_out and self._grown >= self._reach:
            self._reach = min(2 * self._reach, self.rates.depth)
        if self._rounds % self._review == 0 or self._rounds < 2 * self._review:
            self._decide()
        self._rounds += 1
        (nodes, depth), deeper = self._shape, self._deeper()
        again = came_out and self._looked and depth == 0 and self.costs.seconds(*deeper) < 2 * self.costs.verify[1]
        self._looked = again or self._rounds >= self._next_look
        if self._looked:
            self._next_look = self._rounds + self._gap()
            nodes, depth = deeper
        self._grown = depth
        return Plan(nodes, depth, self.rates.width) if depth else Plan(1, 1, self.rates.width)

    def _decide(self) -> None:
        before, self._shape = self._shape, best_shape(self.costs, self.rates, self._reach)
        if before != self._shape:
            self._next_look = self._rounds + self._gap()

    def _deeper(self) -> tuple[int, int]:
        """The shape of a look."""
        nodes, depth = self._shape
        return max(nodes, min(set(self.costs.verify) - {1})), min(depth + 1, self.rates.depth)

    def _gap(self) -> int:
        """Rounds from one look to the next, so that what it takes longer is the share of the time that it may."""
        usual = self.costs.seconds(*self._shape)
        return max(1, math.ceil((self.costs.seconds(*self._deeper()) - usual) / (self._looks * usual)))

    def widest(self, device: torch.device) -> int:
        """The ranks that are kept count of."""
        return self.rates.width


def costs_of(
    target: Target,
    draft: Any,
    *,
    width: int = 4,
    cache: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """Measures a round's parts for `draft` on `target`, or reads what was measured here before.

    Args:
        draft: one that grows its trees by a policy.
        width: of those trees, as `CostAware` is to have it.
        cache: the file that keeps the costs of every pair on this machine, which to delete is to measure anew; by
            default in the user's cache folder. Where it cannot be written nothing is kept.
        clock: seconds.

    Raises:
        ValueError: the draft has no policy, or does not fit the target.
    """
    if not isinstance(getattr(draft, "policy", None), TreePolicy):
        raise ValueError(f"draft: expected one that grows its trees by a policy, got {type(draft).__name__}")
    draft.bind(target)
    path = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specvlm" / "costs.json"
    known = _read(path)
    key = _key(target, draft, width)
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # what is missing or broken is measured
        return Costs({int(n): t for n, t in known[key]["verify"].items()}, known[key]["level"])
    costs = _measured(target, draft, width, clock)
    if not costs.plausible:  # something else had the machine: such times are not for keeping
        return costs
    known[key] = {"verify": {str(n): t for n, t in costs.verify.items()}, "level": costs.level}
    with contextlib.suppress(OSError):  # what cannot be kept is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            part.write_text(json.dumps(known, indent=2) + "\n")
    return costs


def _read(path: Path) -> dict[str, Any]:
    """What the cache holds; a broken one is measured anew."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _key(target: Target, draft: Any, width: int) -> str:
    """Names the machine, the target's sizes, the draft's and its trees'."""
    spec = target.spec
    machine = platform.node(), platform.machine(), torch.get_num_threads()
    device = torch.cuda.get_device_name(spec.device) if spec.device.type == "cuda" else machine
    text = target.model.config.text_config
    widths = spec.hidden_size, text.intermediate_size, spec.vocab_size
    sizes = (*widths, spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim)
    told = repr((device, torch.__version__, str(spec.dtype), sizes, type(draft).__name__, draft.sizes, width))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


@torch.inference_mode()
def _measured(target: Target, draft: Any, width: int, clock: Callable[[], float]) -> Costs:
    spec = target.spec
    ids = torch.zeros(1, _PROMPT, dtype=torch.int64, device=spec.device) + _text_id(spec.media_ids)
    sampling = Sampling(0.0, 0, 1.0, torch.zeros(1, dtype=torch.int64, device=spec.device))
    probe = copy.copy(draft)
    probe.policy = Eagle2(Plan(nodes=8, depth=_DEPTH, width=width))

    def seconds(call: Callable[[], Any]) -> float:
        _wait(spec.device)
        began = clock()
        call()
        _wait(spec.device)
        return clock() - began

    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    state, prompt = target.prefill(inputs, sampling=sampling, limits=Limits(_PROMPT), taps=draft.taps)
    try:
        state.first()
        root = state.tokens[0][-1]
        trees = {n: tree_from_lists([root] * n, [-1] + [0] * (n - 1), device=spec.device) for n in BUCKETS}
        session = probe.start(prompt, state)
        verify: dict[int, list[float]] = {n: [] for n in BUCKETS}
        propose: list[float] = []
        for _ in range(_REPEATS + 1):  # in turn, so that a slow spell of the machine meets all alike
            for n, tree in trees.items():
                verify[n].append(seconds(partial(target.verify, tree, state)))
            propose.append(seconds(partial(session.propose, state)))
    finally:
        state.close()
    # What the machine can do: whatever else it does meanwhile only adds to it.
    return Costs({n: _lower_quartile(times[1:]) for n, times in verify.items()}, _lower_quartile(propose[1:]) / _DEPTH)


def _lower_quartile(times: list[float]) -> float:
    return quantiles(times, n=4, method="inclusive")[0]


def _text_id(media_ids: frozenset[int]) -> int:
    return next(token for token in range(len(media_ids) + 1) if token not in media_ids)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
