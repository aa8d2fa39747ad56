"""What every draft that grows a tree level by level shares: the levels, the policy, the noise, the unread steps."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from specvlm.graphs import PLAIN_DESK, Desk
from specvlm.policies import History, TreePolicy, checked_policy
from specvlm.state import DecodeState, Step
from specvlm.tree import Beam, DraftTree, Growth, Plan
from specvlm_kernels import draft_topk


class Grower(Protocol):
    """A draft's forwards, as growth asks for them. Outputs [B, R, H] stay what the draft makes of them.

    Attributes:
        recording: what tells the forwards from any others that may be recorded on the answer's desk; None: they are not
            to be recorded.
        reads: tensors that they read besides what they are given.
    """

    recording: Hashable
    reads: tuple[Tensor, ...]

    def append(self, step: Step, first: Tensor) -> Tensor:
        """Reads tokens that the target emitted, at positions from `first` [B] on; the output [B, 1, H] at the last."""
        ...

    def expand(self, beam: Beam, above: Tensor, depth: int, plan: Plan, state: DecodeState) -> Tensor:
        """Outputs [B, k, H] for the beam's nodes, whose parents at `depth` gave `above` [B, R, H]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, R, V] of outputs, over what it can propose."""
        ...


class TreeGrower:
    """Grows an answer's trees by a policy, below what the draft has read; a session has one.

    `grow` is the whole of it for a draft with a forward a level; its parts serve others.

    Args:
        policy: the trees' shape.
        exclude: [E] int64 ids that are never proposed.
        shared_noise: choose children under the target's own sampling noise; False is the usual tree, whose nodes are
            the likeliest tokens whatever the target is about to draw.
        vocabulary: [V] int64 tokens that the draft's logits are of; None: all of the target's.
    """

    def __init__(
        self, policy: TreePolicy, exclude: Tensor, shared_noise: bool = True, vocabulary: Tensor | None = None
    ) -> None:
        self._policy, self._exclude, self._shared_noise = policy, exclude, shared_noise
        self._vocabulary = vocabulary
        self._history = History(exclude.device)
        self._recordable = policy.on_device and _hashable(policy)
        self._unread: list[Step] = []

    def grow(self, draft: Grower, state: DecodeState) -> DraftTree:
        """The next round's tree, a forward a level. A round without one costs the draft nothing.

        Raises:
            ValueError: the policy wants more nodes expanded than the draft's KV has room for.
        """
        plan = self.plan(state)
        if plan is None:
            return state.root_tree()
        Plan.check_room(plan)  # whatever kind of plan the policy made
        desk, steps = self._desk(draft, state), self._taken()
        inside, around = (nullcontext, state.drafting) if desk.records else (state.drafting, nullcontext)

        def grown() -> tuple[Any, ...]:
            return self._grown(draft, state, steps, plan, inside)

        key = "grow", draft.recording, self._policy, self._shared_noise, plan, *state.sampling.numbers
        step = steps[-1]
        reads = step.tokens, step.features, step.count, state.kv_len, *state.sampling.tensors, *draft.reads
        with around():
            *tree, root_scores = desk.run(key, grown, reads, into="tree")
        return self._remembered(DraftTree(*tree), root_scores)

    def _desk(self, draft: Grower, state: DecodeState) -> Desk:
        """The answer's, unless growth depends on more than the desk is told this time."""
        told = self._recordable and draft.recording is not None and len(self._unread) == 1
        return state.desk if told else PLAIN_DESK

    def _grown(
        self,
        draft: Grower,
        state: DecodeState,
        steps: Sequence[Step],
        plan: Plan,
        drafting: Callable[[], AbstractContextManager[None]],
    ) -> tuple[Any, ...]:
        """The tree, field by field, and the root's children's log-probabilities."""
        with drafting():
            for step, first in _placed(steps, state.kv_len):
                hidden = draft.append(step, first)
        growth = Growth(steps[-1].last, plan)
        for depth in range(plan.depth):
            with drafting():
                logits = draft.logits(hidden)
            positions = (state.kv_len + depth)[:, None].expand(logits.shape[:2])
            self.extend(growth, *self.children(logits, positions, plan, state), depth, plan)
            if depth + 1 < plan.depth:
                beam = growth.beam()
                above = rows_of(hidden, beam.parent_rows)
                with drafting():
                    hidden = draft.expand(beam, above, depth, plan, state)
        return self._selected(growth, plan)

    def plan(self, state: DecodeState) -> Plan | None:
        """Takes in what the last round emitted, and decides the next tree's shape; None: nothing is drafted.

        The round's step joins those that `unread` hands over, so a draft reads later what it missed.
        """
        self._history.observe(state)
        self._unread.append(state.step)
        plan = self._policy.plan(self._history)
        if plan.nodes == 1:
            self._history.skip()
            self._unread[-1] = state.step.copied()  # it may lie on a desk, where the next one will
            return None
        return plan

    def unread(self, state: DecodeState) -> Iterator[tuple[Step, Tensor]]:
        """The steps since the draft last read, each with the position [B] of its first token."""
        return _placed(self._taken(), state.kv_len)

    def _taken(self) -> list[Step]:
        steps, self._unread = merged(self._unread), []
        return steps

    def children(self, logits: Tensor, positions: Tensor, plan: Plan, state: DecodeState) -> tuple[Tensor, Tensor]:
        """The best tokens [B, R, width] below nodes at `positions` [B, R], and their log-probabilities."""
        return draft_topk(
            logits,
            plan.width,
            positions,
            temperature=state.sampling.temperature if self._shared_noise else 0.0,
            seed=state.sampling.seed,
            exclude=self._exclude,
            vocabulary=self._vocabulary,
        )

    def extend(self, growth: Growth, tokens: Tensor, scores: Tensor, depth: int, plan: Plan) -> None:
        """Adds children of nodes at `depth` to the tree, those that the policy lets in."""
        growth.expand(tokens, self._policy.admit(scores, growth.parent_scores, depth + 1, plan))

    def select(self, growth: Growth, plan: Plan) -> DraftTree:
        """The policy's tree of all that has grown."""
        *tree, root_scores = self._selected(growth, plan)
        return self._remembered(DraftTree(*tree), root_scores)

    def _selected(self, growth: Growth, plan: Plan) -> tuple[Any, ...]:
        candidates = growth.candidates()
        tree = self._policy.select(candidates, plan)
        root_scores = candidates.scores[0, candidates.level(1)]
        return tree.tokens, tree.parents, tree.depths, tree.scores, tree.max_depth, root_scores

    def _remembered(self, tree: DraftTree, root_scores: Tensor) -> DraftTree:
        if self._policy.looks_back:
            self._history.record(tree, root_scores)
        return tree


def _hashable(policy: TreePolicy) -> bool:
    """Whether a policy can tell its recordings from another's; one with a list among its fields cannot."""
    try:
        hash(policy)
    except TypeError:
        return False
    return True


def _placed(steps: Sequence[Step], kv_len: Tensor) -> Iterator[tuple[Step, Tensor]]:
    """The steps that end at the root, which stands at `kv_len` [B], each with the position [B] of its first token."""
    first = kv_len + 1 - torch.stack([step.count for step in steps]).sum(dim=0).int()
    for step in steps:
        yield step, first
        first = first + step.count


def merged(steps: Sequence[Step]) -> list[Step]:
    """The steps with every run of single tokens joined into one step of that many; a step with room for more than
    one stands alone, since what follows its tokens is garbage."""
    found: list[Step] = []
    for single, group in groupby(steps, key=lambda step: step.tokens.shape[1] == 1):
        run = list(group)
        if not single or len(run) == 1:
            found += run
            continue
        tokens, features, counts = zip(*((step.tokens, step.features, step.count) for step in run), strict=True)
        found.append(Step(torch.cat(tokens, dim=1), torch.cat(features, dim=1), torch.stack(counts).sum(dim=0).int()))
    return found


def check_policy(
    policy: TreePolicy, device: torch.device, tokens: int, among: str, *, stores_trees: bool = True
) -> None:
    """Checks that a draft can grow the trees of `policy` on `device`.

    Args:
        tokens, among: how many tokens it can propose, and how a message calls them.
        stores_trees: the draft keeps the KV of the nodes that it expands.

    Raises:
        ValueError: it cannot.
        TypeError: the policy is none.
    """
    checked_policy(policy)  # it may have been set since the draft was made
    if policy.free and stores_trees:
        raise ValueError(
            f"policy: expected one whose levels a draft's KV has room for, got {type(policy).__name__}, which is for "
            "block drafts"
        )
    if (width := policy.widest(device)) > tokens:
        raise ValueError(f"width: expected at most the {among}, got {width}")


def draft_slab(state: DecodeState, layers: int, kv_heads: int, head_dim: int) -> Tensor:
    """Room [layers, 2, B, kv_heads, S, head_dim] for a draft's KV of one answer, as long as the target's.

    Raises:
        ValueError: it would not fit the device's free memory.
    """
    _, _, batch, _, slots, _ = state.slab.shape
    shape = (layers, 2, batch, kv_heads, slots, head_dim)
    return state.desk.room("draft's KV", lambda: state.pool.new(shape), shape)


def rows_of(hidden: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, k] of hidden [B, R, H] -> [B, k, H]."""
    return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
