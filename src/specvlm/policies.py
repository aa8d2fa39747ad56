"""Tree policies: how large a round's tree is, which nodes get children, and which of all nodes are verified.

A policy fixes the shape on the host, from what past rounds told, so that no round waits for the device; what it leaves
out within a shape is a mask on the device. Policies change how soon tokens come, never which.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specvlm.checks import check_int, check_number
from specvlm.state import DecodeState
from specvlm.tree import BUCKETS, Candidates, DraftTree, FreePlan, Plan, rerank

#: Trees worth their nodes: where a round's time follows the node count, and where nodes are nearly free.
CPU_PLAN = Plan(nodes=8, depth=5, width=2)
GPU_PLAN = Plan(nodes=64, depth=6, width=10)

#: Rounds over which SAGE looks back.
_WINDOW = 10


def default_plan(device: torch.device) -> Plan:
    """The tree's shape where nothing else was asked for."""
    return GPU_PLAN if device.type == "cuda" else CPU_PLAN


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the target did at a node that had children.

    Attributes:
        depth: the children's.
        children: how many there were.
        rank: which of them the target drew, 0 the one of the highest score; None: none of them.
    """

    depth: int
    children: int
    rank: int | None


class History:
    """What an answer's past rounds told, on the host; a session has one.

    A round's tree is copied while the target verifies it, so reading it in the next round waits for nothing.

    Args:
        device: where the answer is decoded.

    Attributes:
        taken: drafted tokens accepted, a number for every round that had a tree.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.taken: list[int] = []
        self._said = 0
        self._accepted: list[int] = []
        self._tree: DraftTree | None = None
        self._root_scores: Tensor | None = None

    def observe(self, state: DecodeState) -> None:
        """Takes in what the last round emitted."""
        answer = state.tokens[0]
        self._accepted = answer[self._said : -1] if self._said else []
        self._said = len(answer)
        if self._tree is not None:
            self.taken.append(len(self._accepted))

    def record(self, tree: DraftTree, root_scores: Tensor) -> None:
        """Keeps a round's tree, and the log-probabilities of the root's children before any were left out."""
        tokens, parents, depths, scores = (
            _to_host(each[:1]) for each in (tree.tokens, tree.parents, tree.depths, tree.scores)
        )
        self._tree = DraftTree(tokens, parents, depths, scores, tree.max_depth)
        self._root_scores = _to_host(root_scores)

    def skip(self) -> None:
        """Notes a round without a tree."""
        self._tree = self._root_scores = None

    @property
    def root_scores(self) -> list[float] | None:
        """Log-probabilities of the root's children in the last round; None: there was no tree."""
        return None if self._root_scores is None else self._root_scores.tolist()

    @property
    def depth(self) -> int | None:
        """The deepest node of the last tree; None: there was none."""
        return None if self._tree is None else int(self._tree.depths.max())

    def outcomes(self) -> list[Outcome]:
        """The last round's walk, from the root down to where it left the tree."""
        if self._tree is None:
            return []
        tokens, parents, scores = (
            each[0].tolist() for each in (self._tree.tokens, self._tree.parents, self._tree.scores)
        )
        children: dict[int, list[int]] = {}
        for child, parent in enumerate(parents):
            if parent >= 0:
                children.setdefault(parent, []).append(child)
        found: list[Outcome] = []
        node, drawn = 0, [*self._accepted, None]
        for depth, token in enumerate(drawn, start=1):
            if node not in children:
                break
            ranked = sorted(children[node], key=lambda child: (-scores[child], child))
            rank = next((rank for rank, child in enumerate(ranked) if tokens[child] == token), None)
            found.append(Outcome(depth, len(ranked), rank))
            if rank is None:
                break
            node = ranked[rank]
        return found


class TreePolicy(ABC):
    """Chooses trees; what it learns of one answer is in the answer's `History`."""

    __slots__ = ()

    #: Whether `plan` reads what past rounds told; if not, no tree is copied to the host.
    looks_back: bool = True
    #: Whether its plans are `FreePlan`s, which ask for more nodes than a draft that keeps their KV can expand.
    free: bool = False
    #: Whether what `admit` and `select` do follows from the plan and from what is on the device.
    on_device: bool = True

    @abstractmethod
    def plan(self, history: History) -> Plan:
        """The next round's shape; `nodes` of 1 means that nothing is drafted."""

    @abstractmethod
    def widest(self, device: torch.device) -> int:
        """The most children that a node may be given on `device`."""

    def admit(self, children: Tensor, parents: Tensor, depth: int, plan: Plan) -> Tensor:
        """Children's log-probabilities [B, R, k] given their parents, -inf for those that the tree does without.

        Args:
            children: best first along k.
            parents: [B, R] cumulative log-probabilities, best first.
            depth: the children's, 1 below the root.
        """
        return children

    def select(self, candidates: Candidates, plan: Plan) -> DraftTree:
        """The tree that is verified: the best over all levels, unless a policy knows better."""
        return rerank(candidates, plan)


@dataclass(frozen=True, slots=True)
class Eagle2(TreePolicy):
    """One shape every round, filled with the best candidates over all levels. Source: EAGLE-2 (Li et al., 2024).

    Attributes:
        shape: None: 8 nodes of depth 5 on a CPU, 64 of depth 6 on a GPU.

    Raises:
        TypeError: a shape that is no `Plan`, or one whose levels have no bound.
    """

    shape: Plan | None = None

    looks_back = False

    def __post_init__(self) -> None:
        _check_shape(self.shape)

    def plan(self, history: History) -> Plan:
        return self.shape or default_plan(history.device)

    def widest(self, device: torch.device) -> int:
        return (self.shape or default_plan(device)).width


@dataclass(frozen=True, slots=True)
class FixedShape(TreePolicy):
    """The same number of nodes on every level, round after round; the best of each level.

    Attributes:
        widths: nodes of depth 1, 2, ...

    Raises:
        ValueError: no level, a level without a node, or a tree of more than 128 nodes.
        TypeError: widths that are no integers.
    """

    widths: tuple[int, ...] = (4, 4, 3, 2, 2)

    looks_back = False

    def __post_init__(self) -> None:
        if not isinstance(self.widths, list | tuple):
            raise TypeError(f"widths: expected one number a level, got {self.widths!r}")
        if not self.widths:
            raise ValueError("widths: expected one number a level, got none")
        for width in self.widths:
            check_int("widths", width, low=1, high=BUCKETS[-1] - 1)
        self._shape()

    def _shape(self) -> Plan:
        return Plan(nodes=1 + sum(self.widths), depth=len(self.widths), width=max(self.widths))

    def plan(self, history: History) -> Plan:
        return self._shape()

    def widest(self, device: torch.device) -> int:
        return max(self.widths)

    def admit(self, children: Tensor, parents: Tensor, depth: int, plan: Plan) -> Tensor:
        """Only nodes that will be in the tree, which are a level's best, have children."""
        if depth == 1 or self.widths[depth - 2] >= parents.shape[1]:
            return children
        rows = torch.arange(parents.shape[1], device=parents.device)
        return children.masked_fill((rows >= self.widths[depth - 2])[:, None], -torch.inf)

    def select(self, candidates: Candidates, plan: Plan) -> DraftTree:
        kept = candidates.scores.clone()
        for level, width in enumerate(self.widths[: len(candidates.sizes)], start=1):
            where = candidates.level(level)
            if level > 1:  # what is left out takes its children with it
                above = kept.gather(1, candidates.parents[:, where])
                kept[:, where] = kept[:, where].masked_fill(above == -torch.inf, -torch.inf)
            order = kept[:, where].sort(dim=1, descending=True, stable=True).indices
            kept[:, where] = kept[:, where].scatter(1, order[:, width:], -torch.inf)
        return rerank(replace(candidates, scores=kept), plan)


@dataclass(frozen=True, slots=True)
class Confidence(TreePolicy):
    """Expands a node while its path's probability is above a threshold, then prunes to a budget. Source: Spec-LLaVA.

    Attributes:
        threshold: the least probability of a path that goes on, in [0, 1).
        shape: the largest tree; None: the device's default.

    Raises:
        TypeError: a threshold that is no number, or a shape that `Eagle2` refuses.
        ValueError: a threshold out of its range.
    """

    threshold: float = 0.1
    shape: Plan | None = None

    looks_back = False

    def __post_init__(self) -> None:
        _check_shape(self.shape)
        check_number("threshold", self.threshold)
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold: expected a number in [0, 1), got {self.threshold}")

    def plan(self, history: History) -> Plan:
        return self.shape or default_plan(history.device)

    def widest(self, device: torch.device) -> int:
        return (self.shape or default_plan(device)).width

    def admit(self, children: Tensor, parents: Tensor, depth: int, plan: Plan) -> Tensor:
        least = math.log(self.threshold) if self.threshold else -math.inf
        return children.masked_fill((parents <= least)[..., None], -torch.inf)


@dataclass(frozen=True, slots=True)
class Sage(TreePolicy):
    """The draft's entropy in one round shapes the next: sure drafts go deep, unsure ones wide. Source: SAGE.

    With alpha = 1 - H / log k over the root's k children: depth = least + alpha (most - least), and width the other way
    round. At depth l a node gets width / l (1/2 + P(parent)) children, and has any while its path's probability is
    above 0.1 l / depth. Unlike the paper's, k is the round's width and not 10, and no node has more children than that:
    proposing ten where two are wanted would cost the draft. So the least width is 2 or more: one child says nothing of
    what else there was, alpha would be 1 from then on, and the width would stay at 1. Every ten rounds, a mean of less
    than 2 accepted takes one off the most levels, one above 3 adds one.

    Attributes:
        depths, widths: the least and the most; of widths the least is at least 2.
        nodes: the most nodes, root included.

    Raises:
        ValueError: bounds out of their range or order, or levels that together hold more nodes than a slab has room
            for.
        TypeError: bounds that are no two integers, or nodes that are none.
    """

    depths: tuple[int, int] = (3, 8)
    widths: tuple[int, int] = (2, 10)
    nodes: int = 64

    def __post_init__(self) -> None:
        for name, lowest in (("depths", 1), ("widths", 2)):
            bounds = getattr(self, name)
            if not isinstance(bounds, list | tuple) or len(bounds) != 2:
                raise TypeError(f"{name}: expected the least and the most, got {bounds!r}")
            least, most = bounds
            check_int(name, least, low=lowest)
            check_int(name, most, low=least)
        Plan(self.nodes, self.depths[1], self.widths[1])

    def plan(self, history: History) -> Plan:
        alpha = _certainty(history.root_scores)
        depth, width = _between((self.depths[0], self._most(history)), alpha), _between(self.widths, 1 - alpha)
        return Plan(self.nodes, depth, width)

    def _most(self, history: History) -> int:
        """The deepest a tree may be, after what the windows of past rounds accepted."""
        least, most = self.depths
        found = most
        for start in range(0, len(history.taken) - _WINDOW + 1, _WINDOW):
            mean = sum(history.taken[start : start + _WINDOW]) / _WINDOW
            found = max(least, found - 1) if mean < 2 else min(most, found + 1) if mean > 3 else found
        return found

    def widest(self, device: torch.device) -> int:
        return self.widths[1]

    def admit(self, children: Tensor, parents: Tensor, depth: int, plan: Plan) -> Tensor:
        probability = parents.exp()
        # The bound on a node's expansion is that of its own level, one above its children's.
        expands = (probability > 0.1 * (depth - 1) / plan.depth) if depth > 1 else torch.ones_like(parents).bool()
        most = (plan.width / depth * (0.5 + probability)).round().clamp(min=1)
        ranks = torch.arange(children.shape[2], device=children.device)
        return children.masked_fill(~(expands[..., None] & (ranks < most[..., None])), -torch.inf)


@dataclass(frozen=True, slots=True)
class OptTree(TreePolicy):
    """Deepens while the expected length still rises: the sum of the best nodes' path probabilities. Source: OPT-Tree.

    The depth that was worth it in one round, and one more, is grown in the next. Unlike the paper's, a level keeps the
    best `width` nodes for the next one and not the best n of a tree of n: the draft's forwards would be as wide as the
    tree. So its lengths, and the depth that they decide, are those of the best tree among the nodes that grew.

    Attributes:
        nodes: the most nodes, root included.
        rise: the least gain in expected tokens that another level has to bring.
        most: levels at most.
        width: nodes expanded a level.
    """

    nodes: int = 16
    rise: float = 0.5
    most: int = 10
    width: int = 4

    def __post_init__(self) -> None:
        Plan(self.nodes, self.most, self.width)
        check_number("rise", self.rise)
        if not (math.isfinite(self.rise) and self.rise >= 0):
            raise ValueError(f"rise: expected a finite number >= 0, got {self.rise}")

    def plan(self, history: History) -> Plan:
        depth = self.most // 2 if history.depth is None else min(history.depth + 1, self.most)
        return Plan(self.nodes, max(depth, 1), self.width)

    def widest(self, device: torch.device) -> int:
        return self.width

    def select(self, candidates: Candidates, plan: Plan) -> DraftTree:
        worth = self.lengths(candidates, plan)  # [B, depth]
        rises = torch.diff(worth, dim=1, prepend=torch.zeros_like(worth[:, :1])) > self.rise
        rises[:, 0] = True
        deepest = rises.int().cumprod(dim=1).sum(dim=1, keepdim=True)
        scores = candidates.scores.masked_fill(candidates.depths[None] > deepest, -torch.inf)
        return rerank(replace(candidates, scores=scores), plan)

    @staticmethod
    def lengths(candidates: Candidates, plan: Plan) -> Tensor:
        """Expected drafted tokens accepted [B, depth] of the best tree of `plan.nodes` that is that deep at most."""
        found = [
            candidates.scores.masked_fill(candidates.depths[None] > depth, -torch.inf)
            .sort(dim=1, descending=True)
            .values[:, : plan.nodes - 1]
            .exp()
            .sum(dim=1)
            for depth in range(1, plan.depth + 1)
        ]
        return torch.stack(found, dim=1)


def checked_policy(policy: object) -> TreePolicy:
    """Itself. Raises a TypeError unless it is an instance of a `TreePolicy`."""
    if not isinstance(policy, TreePolicy):
        raise TypeError(f"policy: expected a TreePolicy, as Eagle2() is one, got {policy!r}")
    return policy


def _check_shape(shape: object) -> None:
    if shape is not None and (not isinstance(shape, Plan) or isinstance(shape, FreePlan)):
        raise TypeError(f"shape: expected a Plan or None, got {shape!r}")


def _certainty(root_scores: Sequence[float] | None) -> float:
    """1 - H / log k of the root's children's probabilities, made to sum to 1; 1/2 where there are none."""
    finite = [score for score in root_scores or () if score > -math.inf]
    if len(finite) < 2:
        return 0.5 if not finite else 1.0
    top = max(finite)
    weights = [math.exp(score - top) for score in finite]
    total = sum(weights)
    entropy = -sum(w / total * math.log(w / total) for w in weights if w)
    return min(1.0, max(0.0, 1 - entropy / math.log(len(finite))))


def _between(bounds: tuple[int, int], share: float) -> int:
    return round(bounds[0] + share * (bounds[1] - bounds[0]))


def _to_host(x: Tensor) -> Tensor:
    """A copy on the host that is there once the device is waited for."""
    if x.device.type == "cpu":
        return x
    there = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return there.copy_(x, non_blocking=True)
