"""The draft tree, the buckets its size is rounded up to, and how it grows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from specvlm.checks import check_int
from specvlm_kernels import pack_ancestors, rerank_tree, select_beam
from specvlm_kernels.drafting import MOST_CHILDREN

#: Sizes a tree may have, so that a graph is captured once a size.
BUCKETS = (1, 8, 16, 32, 64, 128)
#: Shapes that are remembered: more than a policy has, since making what belongs to a new one waits for the device.
_SHAPES = 4096


def bucket(nodes: int) -> int:
    """The smallest bucket that holds `nodes` nodes.

    Raises:
        ValueError: `nodes` is not in 1..128.
    """
    for size in BUCKETS:
        if 1 <= nodes <= size:
            return size
    raise ValueError(f"nodes: expected 1 to {BUCKETS[-1]}, got {nodes}")


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Proposed continuations of the root, as a tree; parents precede their children.

    Attributes:
        tokens: [B, N] int64; node 0 is the root, the last emitted token; every id is a valid one.
        parents: [B, N] int32, below the node's own index; -1 for the root and for unused rows.
        depths: [B, N] int32; 0 for the root and for unused rows.
        scores: [B, N] fp32 cumulative log-probability; root 0, unused rows -inf.
        max_depth: the deepest a node may be: the most tokens a round can accept.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    scores: Tensor
    max_depth: int


def root_only(root: Tensor) -> DraftTree:
    """The tree of one node, with which a round is a step of autoregressive decoding. `root` is [B] int64."""
    zeros = torch.zeros(root.shape[0], 1, dtype=torch.int32, device=root.device)
    return DraftTree(root[:, None], zeros - 1, zeros, zeros.float(), 0)


def tree_from_lists(
    tokens: Sequence[int], parents: Sequence[int], *, scores: Sequence[float] | None = None, device: torch.device
) -> DraftTree:
    """A batch of one tree from host lists, padded to its bucket with unused rows.

    Args:
        tokens: the root's token, then the nodes'.
        parents: -1 for the root, then each node's parent, which precedes it.
        scores: cumulative log-probabilities; zeros when the draft has none.
        device: where the tree goes; the copy does not synchronise.

    Raises:
        ValueError: more than 128 nodes, or a parent that does not precede its child.
    """
    nodes = len(tokens)
    depths = [0] * nodes
    for node in range(1, nodes):
        if not 0 <= parents[node] < node:
            raise ValueError(f"parents[{node}]: expected 0 to {node - 1}, got {parents[node]}")
        depths[node] = depths[parents[node]] + 1
    unused = bucket(nodes) - nodes
    node_scores = list(scores) if scores is not None else [0.0] * nodes
    rows = torch.tensor(
        [[*tokens, *[tokens[0]] * unused], [*parents, *[-1] * unused], [*depths, *[0] * unused]], dtype=torch.int64
    )
    rows = rows.to(device, non_blocking=True)
    return DraftTree(
        tokens=rows[0:1],
        parents=rows[1:2].int(),
        depths=rows[2:3].int(),
        scores=torch.tensor([node_scores + [float("-inf")] * unused], dtype=torch.float32).to(
            device, non_blocking=True
        ),
        max_depth=max(depths),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """The shape of a round's tree, fixed on the host before it grows.

    Attributes:
        nodes: the most nodes, root included.
        depth: the deepest node, which is the draft's forwards a round.
        width: nodes expanded a level, and children proposed for each.

    Raises:
        ValueError: nodes or depth outside 1..128, width outside 1..64, or levels that together hold more nodes than a
            slab has room for.
        TypeError: a field that is no integer.
    """

    nodes: int
    depth: int
    width: int

    def __post_init__(self) -> None:
        check_int("nodes", self.nodes, low=1, high=BUCKETS[-1])
        check_int("depth", self.depth, low=1, high=BUCKETS[-1])
        check_int("width", self.width, low=1, high=MOST_CHILDREN)
        self.check_room()

    def check_room(self) -> None:
        """Checks that a draft's slab has room for the KV of the nodes that it expands."""
        if (self.depth - 1) * self.width > BUCKETS[-1]:
            raise ValueError(
                f"width: expected (depth - 1) * width of at most {BUCKETS[-1]}, got {self.depth - 1} * {self.width}"
            )


class FreePlan(Plan):
    """A plan for a draft that expands nodes without storing them: its levels may be as wide as they like."""

    __slots__ = ()

    def check_room(self) -> None:
        """There is nothing to make room for."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Every node that a draft has thought of in a round, in the order of their depth, root excluded.

    Attributes:
        root: [B] int64.
        tokens: [B, C] int64.
        parents: [B, C] int64 index of the parent among the candidates; -1 for the root's children.
        scores: [B, C] fp32 cumulative log-probability, never above the parent's; -inf: no node.
        sizes: candidates of depth 1, 2, ...
    """

    root: Tensor
    tokens: Tensor
    parents: Tensor
    scores: Tensor
    sizes: tuple[int, ...]

    @property
    def depths(self) -> Tensor:
        """[C] int32, at least 1."""
        return _level_depths(self.sizes, self.tokens.device)

    def level(self, depth: int) -> slice:
        """Where the candidates of `depth` stand."""
        first = sum(self.sizes[: depth - 1])
        return slice(first, first + self.sizes[depth - 1])


@dataclass(frozen=True, slots=True)
class Beam:
    """A level's nodes that the draft is to expand.

    Attributes:
        tokens: [B, k] int64.
        parent_rows: [B, k] int64: which row of the draft's last output is their parent's.
        ancestors: [B, k, W] packed bits over the tree's slots in the draft's KV, `k` slots a level.
    """

    tokens: Tensor
    parent_rows: Tensor
    ancestors: Tensor


class Growth:
    """A tree that grows as EAGLE-2 grows it: the best `width` nodes of a level get `width` children each.

    Everything stays on the device. Source: EAGLE-2 (Li et al., 2024), section 4.1.

    Args:
        root: [B] int64.
        plan: its depth and width.
    """

    def __init__(self, root: Tensor, plan: Plan) -> None:
        self._root, self._plan = root, plan
        batch = root.shape[0]
        words = -(-(plan.depth - 1) * plan.width // 64)
        self._above = root.new_zeros(batch, 1, max(words, 1))
        self._scores = torch.zeros(batch, 1, dtype=torch.float32, device=root.device)
        self._index = root.new_full((batch, 1), -1)
        self._levels: list[tuple[Tensor, Tensor, Tensor]] = []
        self._count = 0

    @property
    def parent_scores(self) -> Tensor:
        """[B, R] fp32 cumulative log-probabilities of the nodes that `expand` adds children to."""
        return self._scores

    def expand(self, tokens: Tensor, scores: Tensor) -> None:
        """Adds a level: children [B, R, k] of the R nodes of the last beam (of the root, at first).

        Args:
            tokens: int64.
            scores: fp32 log-probabilities given the parent, at most 0; -inf: no child.
        """
        cumulative = self._scores[..., None] + scores
        parents = self._index[..., None].expand_as(tokens)
        self._levels.append((tokens.flatten(1), parents.flatten(1), cumulative.flatten(1)))

    def beam(self) -> Beam:
        """The best nodes of the last level, ties to the first; they are what `expand` adds children to next."""
        tokens, _, scores = self._levels[-1]
        width, level = self._plan.width, len(self._levels) - 1
        chosen, parent_rows, index, self._scores, self._above = select_beam(
            tokens, scores, self._above, min(width, tokens.shape[1]), level * width
        )
        self._index = self._count + index
        self._count += tokens.shape[1]
        return Beam(chosen, parent_rows, self._above)

    def candidates(self) -> Candidates:
        """All nodes of all levels."""
        tokens, parents, scores = (torch.cat(parts, dim=1) for parts in zip(*self._levels, strict=True))
        return Candidates(self._root, tokens, parents, scores, tuple(level[0].shape[1] for level in self._levels))


@lru_cache(maxsize=_SHAPES)
def _level_depths(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[sum(sizes)] int32: 1 for the first level's nodes, and so on."""
    return torch.repeat_interleave(torch.arange(1, len(sizes) + 1, dtype=torch.int32), torch.tensor(sizes)).to(device)


@lru_cache(maxsize=_SHAPES)
def chain_ancestors(length: int, device: torch.device) -> Tensor:
    """[1, length, W] packed bits of tokens that follow one another."""
    return pack_ancestors(torch.arange(-1, length - 1, dtype=torch.int32, device=device)[None])


def rerank(candidates: Candidates, plan: Plan) -> DraftTree:
    """The tree of the best `plan.nodes - 1` candidates by cumulative score, over all levels.

    A child never comes without its parent: its score is not above the parent's, and of equals the shallower, which
    stands first, wins. Source: EAGLE-2, section 4.2.
    """
    tree = rerank_tree(
        candidates.root,
        candidates.tokens,
        candidates.parents,
        candidates.scores,
        candidates.depths,
        plan.nodes,
        bucket(plan.nodes),
    )
    nodes = min(plan.nodes, 1 + candidates.tokens.shape[1])
    return DraftTree(*tree, max_depth=min(plan.depth, nodes - 1))


def joined(candidates: Candidates, tokens: Tensor, scores: Tensor) -> Candidates:
    """Candidates and a chain below the root as one set, one candidate a level larger.

    A node of the chain that is a candidate already raises that one's score to its own, if its own is higher; any other
    stands behind the candidates of its depth, so that of equals those go first. Nothing waits for the device.

    Args:
        tokens: [B, D] int64, the chain's, a level of the candidates each.
        scores: [B, D] fp32 cumulative log-probability, nowhere rising; -inf where the chain has ended.
    """
    batch, count = candidates.tokens.shape
    depth = len(candidates.sizes)
    level = candidates.depths.long() - 1  # [C]
    order, place = _chain_layout(candidates.sizes, tokens.device)
    # A candidate is the chain's if its token is, and its ancestors' are: every turn sees twice as far up to the root,
    # which is row 0.
    same = (candidates.tokens == tokens[:, level]) & (candidates.scores > -torch.inf)
    on_chain, up = pad(same, (1, 0), value=True), pad(candidates.parents + 1, (1, 0))
    for _ in range((depth - 1).bit_length()):
        on_chain, up = on_chain & on_chain.gather(1, up), up.gather(1, up)
    on_chain = on_chain[:, 1:]
    # Where the chain's nodes stand [B, D]: at a candidate or at their own place. The last column takes all the rest.
    own = place[count:].expand(batch, -1)
    stands = pad(own, (0, 1)).scatter(1, torch.where(on_chain, level, depth), place[:count].expand(batch, -1))[:, :-1]
    raised = candidates.scores.maximum(scores[:, level])
    new_tokens = torch.cat([candidates.tokens, tokens], dim=1)
    new_parents = torch.cat([(candidates.parents + level - 1).clamp(min=-1), pad(stands[:, :-1], (1, 0), value=-1)], 1)
    new_scores = torch.cat(
        [torch.where(on_chain, raised, candidates.scores), scores.masked_fill(stands != own, -torch.inf)], dim=1
    )
    return Candidates(
        root=candidates.root,
        tokens=new_tokens[:, order],
        parents=new_parents[:, order],
        scores=new_scores[:, order],
        sizes=tuple(size + 1 for size in candidates.sizes),
    )


@lru_cache(maxsize=_SHAPES)
def _chain_layout(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """How candidates of these sizes and a chain behind them, C + D in all, are put in the order of depth, and where
    each of them then stands."""
    depths = torch.cat([_level_depths(sizes, torch.device("cpu")), torch.arange(1, len(sizes) + 1)])
    order = depths.sort(stable=True).indices
    return order.to(device), order.argsort().to(device)
