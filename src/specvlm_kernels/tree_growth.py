"""A draft tree that grows on the device: a level's best nodes, which are given children next, and the best of all.

    select_beam   the `width` best of a level by cumulative log-probability, ties to the first
    rerank_tree   the best nodes - 1 of all levels, ties to the first, as a tree in the order of depth

A child's cumulative log-probability is never above its parent's, and its parent stands before it: so whoever is among
the best has a parent that is too, and what is kept in its old order is a tree. Source: EAGLE-2 (Li et al., 2024),
sections 4.1 and 4.2.

One program holds a level as packed int64 keys (value, first node first), of which it takes the largest `width` times.
For the whole tree a program ranks 64 candidates by counting those above them, and another a row counts, in their order,
which stay, so that each knows its own place and its parent's. Plain torch makes some ten launches of a beam and twenty
of a tree, which cost more than what they do.
"""

import torch
import triton
import triton.language as tl

from ._checks import check_range, check_tensor, check_whole
from ._dispatch import on_device, takes_kernel
from .filters import LEAST_64, key_token, key_value, pack_key
from .reference import tree_growth as reference

#: The widest beam, the largest level, and the most nodes of a tree.
MOST_BEAM, MOST_LEVEL, MOST_NODES = 64, 4096, 128

#: Candidates that a program ranks, and holds them against at a time; candidates that are placed at a time.
RANK_ROWS, PLACE_TILE = 64, 1024


@triton.jit(do_not_specialize=["count", "siblings", "rows", "words", "first_slot"])
def _select_beam_kernel(
    tokens, scores, ancestors, beam_tokens, beam_rows, beam_index, beam_scores, beam_ancestors,
    count, siblings, rows, words, first_slot,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_c, o_w = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_W)
    m_w = o_w < WIDTH
    b_key = pack_key(tl.load(scores + i_b * count + o_c, mask=o_c < count, other=0.0), o_c)
    b_key = tl.where(o_c < count, b_key, LEAST_64)

    b_best = tl.full([BLOCK_W], 0, tl.int64)
    for i in range(WIDTH):
        best = tl.max(b_key, 0)
        b_best = tl.where(o_w == i, best, b_best)
        b_key = tl.where(b_key == best, LEAST_64, b_key)

    b_index = tl.where(m_w, key_token(b_best), 0)
    b_row = b_index // siblings
    o_beam = i_b * WIDTH + o_w
    tl.store(beam_tokens + o_beam, tl.load(tokens + i_b * count + b_index, mask=m_w), mask=m_w)
    tl.store(beam_rows + o_beam, b_row, mask=m_w)
    tl.store(beam_index + o_beam, b_index, mask=m_w)
    tl.store(beam_scores + o_beam, key_value(b_best), mask=m_w)
    o_slot = first_slot + o_w
    for i_word in range(words):
        b_word = tl.load(ancestors + (i_b * rows + b_row) * words + i_word, mask=m_w, other=0)
        b_own = tl.full([BLOCK_W], 1, tl.int64) << (o_slot % 64).to(tl.int64)
        b_word |= tl.where(o_slot // 64 == i_word, b_own, 0)
        tl.store(beam_ancestors + o_beam * words + i_word, b_word, mask=m_w)


@triton.jit(do_not_specialize=["count", "kept"])
def _rank_kernel(scores, keeps, count, kept, BLOCK_C: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    o_c, o_t = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_C)
    p_row = scores + i_b * count
    b_key = pack_key(tl.load(p_row + o_c, mask=o_c < count, other=0.0), o_c)
    b_rank = tl.full([BLOCK_C], 0, tl.int32)
    for start in range(0, count, BLOCK_C):
        o_other = start + o_t
        b_other = pack_key(tl.load(p_row + o_other, mask=o_other < count, other=0.0), o_other)
        b_other = tl.where(o_other < count, b_other, LEAST_64)
        b_rank += tl.sum((b_other[None, :] > b_key[:, None]).to(tl.int32), 1)
    tl.store(keeps + i_b * count + o_c, (b_rank < kept).to(tl.int32), mask=o_c < count)


@triton.jit(do_not_specialize=["count", "size"])
def _place_kernel(
    root, tokens, parents, scores, depths, keeps, out_tokens, out_parents, out_depths, out_scores, count, size,
    BLOCK_N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`keeps` [B, C] holds 1 for who stays, and then its place in the tree; 0 for who goes."""
    i_b, o_n, o_t = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_N), tl.arange(0, TILE)
    o_row, o_out = i_b * count, i_b * size
    b_root = tl.load(root + i_b)
    m_n = o_n < size
    tl.store(out_tokens + o_out + o_n, tl.full([BLOCK_N], 0, tl.int64) + b_root, mask=m_n)
    tl.store(out_parents + o_out + o_n, tl.full([BLOCK_N], -1, tl.int32), mask=m_n)
    tl.store(out_depths + o_out + o_n, tl.full([BLOCK_N], 0, tl.int32), mask=m_n)
    tl.store(out_scores + o_out + o_n, tl.where(o_n == 0, 0.0, -float("inf")), mask=m_n)

    before = 0
    for start in range(0, count, TILE):
        o_c = start + o_t
        b_keep = tl.load(keeps + o_row + o_c, mask=o_c < count, other=0)
        b_place = before + tl.cumsum(b_keep, 0)
        tl.store(keeps + o_row + o_c, b_place * b_keep, mask=o_c < count)
        before += tl.sum(b_keep, 0)
    tl.debug_barrier()  # places are there for children to read, and the filling for nodes to stand on
    for start in range(0, count, TILE):
        o_c = start + o_t
        b_place = tl.load(keeps + o_row + o_c, mask=o_c < count, other=0)
        b_score = tl.load(scores + o_row + o_c, mask=o_c < count, other=-float("inf"))
        m_node = (b_place > 0) & (b_score > -float("inf"))
        b_parent = tl.load(parents + o_row + o_c, mask=m_node, other=-1)
        # Clamped, so that a bad parent reads no more than the row.
        b_parent = tl.minimum(b_parent, count - 1)
        b_above = tl.load(keeps + o_row + b_parent, mask=m_node & (b_parent >= 0), other=0)
        p_place = o_out + b_place
        tl.store(out_tokens + p_place, tl.load(tokens + o_row + o_c, mask=m_node), mask=m_node)
        tl.store(out_parents + p_place, b_above, mask=m_node)
        tl.store(out_depths + p_place, tl.load(depths + o_c, mask=m_node), mask=m_node)
        tl.store(out_scores + p_place, b_score, mask=m_node)


def launch_select_beam(
    tokens: torch.Tensor, scores: torch.Tensor, ancestors: torch.Tensor, width: int, first_slot: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the kernel; arguments as in `select_beam`, already checked."""
    (batch, count), (_, rows, words), device = tokens.shape, ancestors.shape, tokens.device
    beam_tokens, beam_rows, beam_index = (
        torch.empty((batch, width), dtype=torch.int64, device=device) for _ in range(3)
    )
    beam_scores = torch.empty((batch, width), dtype=torch.float32, device=device)
    beam_ancestors = torch.empty((batch, width, words), dtype=torch.int64, device=device)
    block = triton.next_power_of_2(count)
    _select_beam_kernel[(batch,)](
        tokens.contiguous(), scores.contiguous(), ancestors.contiguous(),
        beam_tokens, beam_rows, beam_index, beam_scores, beam_ancestors,
        count, count // rows, rows, words, first_slot,
        WIDTH=width, BLOCK_C=block, BLOCK_W=triton.next_power_of_2(width), num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip
    return beam_tokens, beam_rows, beam_index, beam_scores, beam_ancestors


def launch_rerank_tree(
    root: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    depths: torch.Tensor,
    nodes: int,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the kernels; arguments as in `rerank_tree`, already checked."""
    (batch, count), device = tokens.shape, tokens.device
    keeps = torch.empty((batch, count), dtype=torch.int32, device=device)
    out_tokens = torch.empty((batch, size), dtype=torch.int64, device=device)
    out_parents, out_depths = (torch.empty((batch, size), dtype=torch.int32, device=device) for _ in range(2))
    out_scores = torch.empty((batch, size), dtype=torch.float32, device=device)
    scores = scores.contiguous()
    _rank_kernel[(batch, triton.cdiv(count, RANK_ROWS))](
        scores, keeps, count, nodes - 1, BLOCK_C=RANK_ROWS, num_warps=4
    )
    _place_kernel[(batch,)](
        root.contiguous(), tokens.contiguous(), parents.contiguous(), scores, depths.contiguous(), keeps,
        out_tokens, out_parents, out_depths, out_scores, count, size,
        BLOCK_N=triton.next_power_of_2(size), TILE=min(PLACE_TILE, max(16, triton.next_power_of_2(count))),
        num_warps=4,
    )  # fmt: skip
    return out_tokens, out_parents, out_depths, out_scores


@torch.library.custom_op("specvlm_kernels::select_beam", mutates_args=())
def _select_beam(
    tokens: torch.Tensor, scores: torch.Tensor, ancestors: torch.Tensor, width: int, first_slot: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return select_beam(tokens, scores, ancestors, width, first_slot)


@_select_beam.register_fake
def _(
    tokens: torch.Tensor, scores: torch.Tensor, ancestors: torch.Tensor, width: int, first_slot: int
) -> tuple[torch.Tensor, ...]:
    batch, _, words = ancestors.shape
    ids = [tokens.new_empty(batch, width) for _ in range(3)]
    return *ids, scores.new_empty(batch, width), ancestors.new_empty(batch, width, words)


@torch.library.custom_op("specvlm_kernels::rerank_tree", mutates_args=())
def _rerank_tree(
    root: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    depths: torch.Tensor,
    nodes: int,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return rerank_tree(root, tokens, parents, scores, depths, nodes, size)


@_rerank_tree.register_fake
def _(
    root: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    depths: torch.Tensor,
    nodes: int,
    size: int,
) -> tuple[torch.Tensor, ...]:
    shape = tokens.shape[0], size
    return tokens.new_empty(shape), depths.new_empty(shape), depths.new_empty(shape), scores.new_empty(shape)


def select_beam(
    tokens: torch.Tensor, scores: torch.Tensor, ancestors: torch.Tensor, width: int, first_slot: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best nodes of a level, and what a draft needs to give them children. Source: EAGLE-2, section 4.1.

    Args:
        tokens: [B, R * k] int64, the k children of each of the R nodes above, node after node; at most 4,096.
        scores: [B, R * k] fp32, their cumulative log-probabilities; -inf: no node. NaN is not expected.
        ancestors: [B, R, W] int64 packed bits of what the nodes above see of the tree in the draft's cache.
        width: how many, from 1 to R * k and at most 64.
        first_slot: where in the tree's part of the cache the chosen are to stand, one slot each; they see themselves.

    Returns:
        by falling score, ties to the first: tokens [B, width] int64, rows [B, width] int64 (which of the R nodes is the
        parent), index [B, width] int64 (which of the R * k they are), scores [B, width] fp32, and ancestors
        [B, width, W] int64.

    Raises:
        ValueError: a wrong shape, dtype, device, width or slot.
    """
    check_tensor("tokens", tokens, ("B", "C"), torch.int64)
    kernel = takes_kernel("tokens", tokens)
    batch, count = tokens.shape
    check_tensor("scores", scores, (batch, count), torch.float32, tokens.device)
    check_tensor("ancestors", ancestors, (batch, "R", "W"), torch.int64, tokens.device)
    _, rows, words = ancestors.shape
    if not rows or count % rows or not 0 < count <= MOST_LEVEL:
        raise ValueError(
            f"tokens: expected as many for each of the {rows} nodes above, at most {MOST_LEVEL} in all, got {count}"
        )
    check_whole("width", width, 1, min(count, MOST_BEAM))
    check_whole("first_slot", first_slot, 0, 64 * words - width)
    if torch.compiler.is_compiling():
        return _select_beam(tokens, scores, ancestors, width, first_slot)
    if not kernel:
        return reference.select_beam(tokens, scores, ancestors, width, first_slot)
    with on_device(tokens):
        return launch_select_beam(tokens, scores, ancestors, width, first_slot)


def rerank_tree(
    root: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    depths: torch.Tensor,
    nodes: int,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tree of the best candidates over all levels. Source: EAGLE-2, section 4.2.

    Args:
        root: [B] int64, its token.
        tokens: [B, C] int64, all nodes that a draft has thought of, level after level.
        parents: [B, C] int64, which candidate is the parent; it stands before its children. -1: the root.
        scores: [B, C] fp32 cumulative log-probabilities, never above the parent's; -inf: no node. NaN is not expected.
        depths: [C] int32, at least 1, nowhere falling.
        nodes: the most nodes of the tree, root included, from 1 to 128.
        size: rows of the result, from `nodes` to 128.

    Returns:
        tokens [B, size] int64, parents [B, size] int32, depths [B, size] int32 and scores [B, size] fp32; the root is
        node 0, the others stand in the order of the candidates. The root, and rows without a node, have parent -1 and
        depth 0; the latter the root's token and score -inf.

    Raises:
        ValueError: a wrong shape, dtype, device or number; on CPU also a parent outside [-1, C).
    """
    check_tensor("tokens", tokens, ("B", "C"), torch.int64)
    kernel = takes_kernel("tokens", tokens)
    (batch, count), device = tokens.shape, tokens.device
    if not count:
        raise ValueError("tokens: expected at least one candidate, got none")
    check_tensor("root", root, (batch,), torch.int64, device)
    check_tensor("parents", parents, (batch, count), torch.int64, device)
    check_tensor("scores", scores, (batch, count), torch.float32, device)
    check_tensor("depths", depths, (count,), torch.int32, device)
    check_whole("nodes", nodes, 1, MOST_NODES)
    check_whole("size", size, nodes, MOST_NODES)
    check_range("parents", parents, -1, count)
    if torch.compiler.is_compiling():
        return _rerank_tree(root, tokens, parents, scores, depths, nodes, size)
    if not kernel:
        return reference.rerank_tree(root, tokens, parents, scores, depths, nodes, size)
    with on_device(tokens):
        return launch_rerank_tree(root, tokens, parents, scores, depths, nodes, size)
