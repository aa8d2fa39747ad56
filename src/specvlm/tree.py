"""The draft tree, and the buckets its size is rounded up to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Sizes a tree may have, so that a graph is captured once a size.
BUCKETS = (1, 8, 16, 32, 64, 128)


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
