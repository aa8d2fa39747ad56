"""Attention of a draft tree's nodes over a cached prefix and over the tree itself.

Row i of q is one node. With `n` = kv_len slots of prefix and `A_i` the node's ancestor bits,

    visible(i, s) = s < n  or  bit s - n of A_i,        out_i = sum_s softmax_s(scale * q_i . k_s) v_s

A tree mask over the whole slab would be Q * S entries, built anew every round; here it is Q * ceil(N / 64) words.
The keys fall into two runs. Tiles that end at or before slot n are seen by every row: they carry no mask at all. Only
the last few tiles, those that reach into the tree, test bits: a tile of up to 64 slots takes its 64 bits of a row from
two neighbouring words, where words before the tree count as all ones and words after it as zero. So an odd n costs a
shift, and the prefix's last slots need no case of their own.

The flash-decoding split: a program takes `split` keys of one KV head, computes a softmax of its own, and
leaves a normalised row and the log2 of its sum; a second kernel weighs the parts with `2^(lse - max lse)`. All
query heads that share a KV head lie in one tile (row = node * group + head), so a key is read once for `BLOCK_M` rows.
Partials are fp32, 4 * (D + 1) bytes a row and split: they stay in L2. One split means no partials and no second kernel.

**A row's bits do not depend on its company.** Split and tile borders follow from the slab's capacity, a model's head
count and absolute slots alone, and a tile has `BLOCK_M` rows whatever Q is. Nor does Triton compile anew for another
company: Q, the words a row and q's strides are arguments that nothing is specialised on, kv_len and ancestors are not
specialised on their alignment. Given dense rows and one slab, the same machine code computes a row alone, among 128, or
in another batch.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import reference
from ._checks import (
    FLOATS,
    KERNEL_FLOATS,
    check_finite,
    check_forward_only,
    check_parents,
    check_range,
    check_rows_contiguous,
    check_tensor,
)
from ._dispatch import on_device, takes_kernel

#: exp(x) = 2^(x * LOG2_E): the kernels keep scores and sums in base 2, which is what the hardware computes.
LOG2_E = 1.4426950408889634

#: Ancestor bits in a word.
WORD = 64

#: Programs of a full slab: a half-full one still has about two for each of 132 multiprocessors.
TARGET_PROGRAMS = 512

#: Fewer keys than this in a split cost more in partials than the split gains.
SMALLEST_SPLIT = 128

#: Rows that one program of `pack_ancestors`, and of the merge, handles.
PACK_ROWS = 128
MERGE_ROWS = 4

#: Head sizes, from and to.
HEAD_DIMS = (32, 128)


@dataclass(frozen=True, slots=True)
class TreeAttentionConfig:
    """How `tree_attention` is cut into programs; see `default_config`.

    Attributes:
        split: keys a program, a multiple of `block_n`.
        block_m: rows (nodes times heads of a group) a program.
        block_n: keys a tile, at most 64: a tile's bits of a row fit one word.
        num_warps: warps a program.
        num_stages: tiles in flight in the prefix loop.
    """

    split: int
    block_m: int = 64
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        if self.block_n not in (16, 32, 64):
            raise ValueError(f"block_n: expected 16, 32 or 64, got {self.block_n}")
        if self.block_m < 16 or self.block_m & (self.block_m - 1):
            raise ValueError(f"block_m: expected a power of two of at least 16, got {self.block_m}")
        if self.split <= 0 or self.split % self.block_n:
            raise ValueError(f"split: expected a positive multiple of block_n = {self.block_n}, got {self.split}")


def default_config(capacity: int, kv_heads: int, dtype: torch.dtype) -> TreeAttentionConfig:
    """The cut for a slab: a function of what stays the same for a whole answer, so that rows stay the same too."""
    splits = triton.cdiv(TARGET_PROGRAMS, kv_heads)
    split = max(SMALLEST_SPLIT, triton.cdiv(triton.cdiv(capacity, splits), WORD) * WORD)
    if dtype == torch.float32:  # full fp32 has no tensor cores: products run from registers, and larger tiles spill
        return TreeAttentionConfig(split=split, block_m=16, block_n=16, num_warps=8)
    if capacity <= split:  # rows leave in their own dtype, by 64-bit addresses: with tiles of 64 keys sm_80 spills
        return TreeAttentionConfig(split=split, block_n=32)
    return TreeAttentionConfig(split=split)


@triton.jit
def _word(ancestors, o_row, m_row, words, i_word):
    """Word `i_word` of each row's bits: all ones before the tree (the prefix), zero after it and on absent rows."""
    is_tree = (i_word >= 0) & (i_word < words)
    b_word = tl.load(ancestors + o_row * words + i_word, mask=m_row & is_tree, other=0)
    return tl.where(i_word < 0, -1, b_word).to(tl.uint64, bitcast=True)


@triton.jit
def _tile_bits(ancestors, o_row, m_row, words, offset, room):
    """For each row, 64 bits: which slots it sees from `offset` slots after kv_len on (or before it), `room` at most."""
    i_word = offset >> 6  # rounds down, also before the tree
    shift = (offset & 63).to(tl.uint64)
    b_low = _word(ancestors, o_row, m_row, words, i_word) >> shift
    b_high = _word(ancestors, o_row, m_row, words, i_word + 1) << ((64 - shift) & 63)
    b_bits = tl.where(shift == 0, b_low, b_low | b_high)
    i_one = tl.full([], 1, tl.uint64)
    return tl.where(room >= 64, b_bits, b_bits & ((i_one << (room & 63).to(tl.uint64)) - 1))


@triton.jit
def _unpack(b_bits, o_n):
    """The bits `o_n` of words, as booleans. In halves: 64-bit shifts of a whole tile would fill the registers."""
    b_half = tl.where(o_n < 32, b_bits.to(tl.uint32), (b_bits >> 32).to(tl.uint32))
    return ((b_half >> (o_n & 31).to(tl.uint32)) & 1) != 0


@triton.jit
def _load_tile(p_slab, start, stride, m_slot, MASKED: tl.constexpr, D: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """[BLOCK_N, BLOCK_D] of one head's keys or values from slot `start` on; `m_slot` is looked at where MASKED."""
    o_slot, o_d = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)[None, :]
    p_tile = p_slab + o_slot.to(tl.int64)[:, None] * stride + o_d
    if MASKED:
        b_tile = tl.load(p_tile, mask=m_slot[:, None] & (o_d < D), other=0.0)
    elif D == BLOCK_D:
        b_tile = tl.load(p_tile)
    else:
        b_tile = tl.load(p_tile, mask=o_d < D, other=0.0)
    return b_tile


@triton.jit
def _attend(b_q, b_k, b_v, b_max, b_sum, b_out, scale_log2, m_seen, MASKED: tl.constexpr):
    """One tile's step of the online softmax, in base 2; `m_seen` [rows, keys] is looked at where MASKED."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
    if MASKED:
        b_s = tl.where(m_seen, b_s, -float("inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # A row that has seen nothing yet has the maximum -inf, and -inf - -inf is not a number.
    b_base = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_base[:, None])
    b_shrink = tl.exp2(b_max - b_base)
    b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision="ieee")
    return b_new, b_sum, b_out


@triton.jit(
    do_not_specialize=["queries", "kv_heads", "words", "capacity", "splits", "stride_qb", "stride_qn", "stride_qh"],
    do_not_specialize_on_alignment=["kv_len", "ancestors"],
)
def _tree_attention_kernel(
    q, k_cache, v_cache, kv_len, ancestors, out, part, part_lse, scale_log2,
    queries, kv_heads, words, capacity, splits, split,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    GROUP: tl.constexpr, D: tl.constexpr, Q_UNIT: tl.constexpr, ONE_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_tile, i_split = tl.program_id(0), tl.program_id(1) // kv_heads
    i_head, i_b = tl.program_id(1) % kv_heads, tl.program_id(2).to(tl.int64)

    # Clamped, so that a bad length reads the slab and nothing else.
    n = tl.minimum(tl.maximum(tl.load(kv_len + i_b), 0), capacity)
    first = i_split * split
    last = tl.minimum(tl.minimum(first + split, capacity), n + words * 64)
    if (first >= last) & (i_split > 0):  # the first always leaves something, if only zeros
        return

    o_row = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_row, m_d = o_row < queries * GROUP, o_d < D
    i_node, i_q_head = o_row // GROUP, i_head * GROUP + o_row % GROUP

    # q's strides come in units, which tells the compiler how a row is aligned without a case for each Q.
    o_q = i_b * stride_qb + i_node.to(tl.int64) * stride_qn + i_q_head.to(tl.int64) * stride_qh
    p_q = q + o_q * Q_UNIT
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0)
    p_k = k_cache + i_b * stride_kb + i_head.to(tl.int64) * stride_kh
    p_v = v_cache + i_b * stride_vb + i_head.to(tl.int64) * stride_vh

    b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    whole = tl.maximum(first, tl.minimum(last, n // BLOCK_N * BLOCK_N))  # before it: tiles of prefix only
    for start in tl.range(first, whole, BLOCK_N, num_stages=STAGES):
        b_k = _load_tile(p_k, start, stride_ks, None, False, D, BLOCK_N, BLOCK_D)
        b_v = _load_tile(p_v, start, stride_vs, None, False, D, BLOCK_N, BLOCK_D)
        b_max, b_sum, b_out = _attend(b_q, b_k, b_v, b_max, b_sum, b_out, scale_log2, None, False)

    p_words = ancestors + i_b * queries * words
    for start in tl.range(whole, last, BLOCK_N, num_stages=1):
        b_bits = _tile_bits(p_words, i_node, m_row, words, start - n, capacity - start)
        # A slot that no row names may hold anything, NaN too, and 0 * NaN is NaN: it is not read.
        m_slot = _unpack(tl.reduce_or(b_bits, 0), o_n)
        b_k = _load_tile(p_k, start, stride_ks, m_slot, True, D, BLOCK_N, BLOCK_D)
        b_v = _load_tile(p_v, start, stride_vs, m_slot, True, D, BLOCK_N, BLOCK_D)
        m_seen = _unpack(b_bits[:, None], o_n[None, :])
        b_max, b_sum, b_out = _attend(b_q, b_k, b_v, b_max, b_sum, b_out, scale_log2, m_seen, True)

    # A row that saw nothing leaves zeros and, its maximum being -inf, the weight 2^-inf.
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None]
    o_out = (i_b * queries + i_node) * (kv_heads * GROUP) + i_q_head
    if ONE_SPLIT:
        m_out = m_row[:, None] & m_d[None, :]
        tl.store(out + o_out[:, None] * D + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_out)
    else:
        o_part = o_out * splits + i_split
        tl.store(part_lse + o_part, b_max + tl.log2(b_sum), mask=m_row)
        tl.store(part + o_part[:, None] * D + o_d[None, :], b_out, mask=m_row[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["rows", "words", "capacity", "splits"], do_not_specialize_on_alignment=["kv_len"])
def _tree_attention_merge_kernel(
    part, part_lse, kv_len, out, rows, words, capacity, splits, split,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(1).to(tl.int64)
    n = tl.minimum(tl.maximum(tl.load(kv_len + i_b), 0), capacity)
    used = tl.cdiv(tl.minimum(n + words * 64, capacity), split)  # later splits wrote nothing

    o_r, o_d = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    m_r = o_r < rows
    m_rd = m_r[:, None] & (o_d < D)[None, :]
    o_row = i_b * rows + o_r

    b_max = tl.full([BLOCK_R], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    b_out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for i_split in range(used):
        o_part = o_row * splits + i_split
        b_lse = tl.load(part_lse + o_part, mask=m_r, other=-float("inf"))
        b_part = tl.load(part + o_part[:, None] * D + o_d[None, :], mask=m_rd, other=0.0)
        b_new = tl.maximum(b_max, b_lse)
        b_base = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_shrink, b_weight = tl.exp2(b_max - b_base), tl.exp2(b_lse - b_base)
        b_sum = b_sum * b_shrink + b_weight
        b_out = b_out * b_shrink[:, None] + b_weight[:, None] * b_part
        b_max = b_new

    b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    tl.store(out + o_row[:, None] * D + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_rd)


@triton.jit(do_not_specialize=["nodes", "words"])
def _pack_ancestors_kernel(parents, out, nodes, words, BLOCK_N: tl.constexpr):
    i_word, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < nodes

    # All rows climb together; a row that has passed its root stays at -1.
    b_node = tl.where(m_n, o_n, -1)
    b_bits = tl.zeros([BLOCK_N], tl.uint64)
    while tl.max(b_node, 0) >= 0:
        b_bit = tl.full([BLOCK_N], 1, tl.uint64) << (b_node & 63).to(tl.uint64)
        b_bits |= tl.where((b_node >= 0) & (b_node // 64 == i_word), b_bit, 0)
        b_parent = tl.load(parents + i_b * nodes + b_node, mask=b_node >= 0, other=-1)
        # Strictly down, whatever came: it ends, and reads inside the row.
        b_node = tl.where(b_parent < b_node, tl.maximum(b_parent, -1), -1)

    tl.store(out + (i_b * nodes + o_n) * words + i_word, b_bits.to(tl.int64, bitcast=True), mask=m_n)


def _strides(x: torch.Tensor) -> list[int]:
    """Strides but the last. That of an axis of one is free, and set as in a dense tensor: one is no case of its own."""
    return [x.stride(i) if x.shape[i] > 1 else x.shape[i + 1 :].numel() for i in range(x.dim() - 1)]


def launch_tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    ancestors: torch.Tensor,
    scale: float,
    config: TreeAttentionConfig,
) -> torch.Tensor:
    """Runs the kernels with an explicit cut; arguments as in `tree_attention`, already checked."""
    batch, queries, heads, head_dim = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    out = torch.empty((batch, queries, heads, head_dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    group, words = heads // kv_heads, ancestors.shape[-1]
    splits = max(1, triton.cdiv(capacity, config.split))
    one_split = splits == 1
    part_shape = (0,) if one_split else (batch, queries, heads, splits, head_dim)
    part = torch.empty(part_shape, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(part_shape[:-1], dtype=torch.float32, device=q.device)
    block_d = triton.next_power_of_2(head_dim)
    q_strides = _strides(q)
    q_unit = math.gcd(16, head_dim, *q_strides)
    grid = (triton.cdiv(queries * group, config.block_m), kv_heads * splits, batch)
    _tree_attention_kernel[grid](
        q, k_cache, v_cache, kv_len, ancestors, out, part, part_lse, scale * LOG2_E,
        queries, kv_heads, words, capacity, splits, config.split,
        *(stride // q_unit for stride in q_strides), *_strides(k_cache), *_strides(v_cache),
        GROUP=group, D=head_dim, Q_UNIT=q_unit, ONE_SPLIT=one_split,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d, STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip
    if not one_split:
        rows = queries * heads
        _tree_attention_merge_kernel[(triton.cdiv(rows, MERGE_ROWS), batch)](
            part, part_lse, kv_len, out, rows, words, capacity, splits, config.split,
            D=head_dim, BLOCK_R=MERGE_ROWS, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out


def launch_pack_ancestors(parents: torch.Tensor) -> torch.Tensor:
    """Runs the kernel; arguments as in `pack_ancestors`, already checked."""
    batch, nodes = parents.shape
    words = triton.cdiv(nodes, WORD)
    out = torch.empty((batch, nodes, words), dtype=torch.int64, device=parents.device)
    if out.numel():
        grid = (triton.cdiv(nodes, PACK_ROWS), words, batch)
        _pack_ancestors_kernel[grid](parents.contiguous(), out, nodes, words, BLOCK_N=PACK_ROWS, num_warps=4)
    return out


@torch.library.custom_op("specvlm_kernels::pack_ancestors", mutates_args=())
def _pack_ancestors(parents: torch.Tensor) -> torch.Tensor:
    return pack_ancestors(parents)


@_pack_ancestors.register_fake
def _(parents: torch.Tensor) -> torch.Tensor:
    return parents.new_empty((*parents.shape, -(-parents.shape[1] // WORD)), dtype=torch.int64)


@torch.library.custom_op("specvlm_kernels::tree_attention", mutates_args=())
def _tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    ancestors: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return tree_attention(q, k_cache, v_cache, kv_len, ancestors, scale=scale)


@_tree_attention.register_fake
def _(q: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def pack_ancestors(parents: torch.Tensor) -> torch.Tensor:
    """Packs, for every node of a tree, the nodes on its path to the root into bits.

    Args:
        parents: [B, N] int32; parents[b, i] < i, and -1 where a node has no parent.

    Returns:
        [B, N, W] int64, W = ceil(N / 64). Bit j % 64 of word j // 64 of row i: node j is node i or above it. Bit 63 is
        the sign. A row without a parent holds its own bit alone.

    Raises:
        ValueError: a wrong shape or dtype; on CPU also a parent outside [-1, i). On a GPU such a parent ends the path.

    Example:
        >>> pack_ancestors(torch.tensor([[-1, 0, 0, 2]], dtype=torch.int32))[0, :, 0].tolist()
        [1, 3, 5, 13]
    """
    check_tensor("parents", parents, ("B", "N"), torch.int32)
    check_parents(parents)
    kernel = takes_kernel("parents", parents)
    if torch.compiler.is_compiling():
        return _pack_ancestors(parents)
    if not kernel:
        return reference.pack_ancestors(parents)
    with on_device(parents):
        return launch_pack_ancestors(parents)


def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    ancestors: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attends every node to the cached prefix and to its own ancestors in the tree.

    A row sees the slots before kv_len and slot kv_len + j for every bit j that it names. Verifying, Q is the tree's
    size; growing a tree, Q is the number of new nodes and `ancestors` their rows. Keys and values of the nodes are
    written before the call (`write_kv`). Slots that no row sees, and slots past the capacity, may hold anything.

    Args:
        q: [B, Q, Hq, D], D from 32 to 128; fp32, fp16 or bf16 (on CPU fp64 too). Any strides with a contiguous last
            axis.
        k_cache, v_cache: [B, Hkv, S, D], dtype of q, Hkv a divisor of Hq. Strides as for q.
        kv_len: [B] int32, stored slots, in [0, S].
        ancestors: [B, Q, W] int64 as `pack_ancestors` makes them.
        scale: of the scores, a finite number; None: D ** -0.5.

    Returns:
        [B, Q, Hq, D], contiguous, dtype of q. A row that sees no slot at all is zero.

    Raises:
        ValueError: a wrong shape, dtype, device, stride or scale; on CPU also kv_len outside [0, S]. The kernel is
            forward only (the reference, on CPU, is not): where it serves, also a q, k_cache or v_cache that requires a
            gradient while gradients are enabled.

    Flash-decoding (Dao et al., 2023) with the tree mask of SpecInfer (Miao et al., 2024).
    """
    check_tensor("q", q, ("B", "Q", "Hq", "D"), FLOATS)
    kernel = takes_kernel("q", q)
    if kernel:
        check_tensor("q", q, q.shape, KERNEL_FLOATS)
    batch, queries, heads, head_dim = q.shape
    device = q.device
    check_tensor("k_cache", k_cache, (batch, "Hkv", "S", head_dim), q.dtype, device)
    check_tensor("v_cache", v_cache, tuple(k_cache.shape), q.dtype, device)
    check_tensor("kv_len", kv_len, (batch,), torch.int32, device)
    check_tensor("ancestors", ancestors, (batch, queries, "W"), torch.int64, device)
    kv_heads, capacity = k_cache.shape[1:3]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q: expected a multiple of k_cache's {kv_heads} heads, got {heads}")
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        raise ValueError(f"q: expected a head size from {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, got {head_dim}")
    check_rows_contiguous("q", q)
    check_rows_contiguous("k_cache", k_cache)
    check_rows_contiguous("v_cache", v_cache)
    check_range("kv_len", kv_len, 0, capacity + 1)
    if scale is None:
        scale = head_dim**-0.5
    check_finite("scale", scale)
    if torch.compiler.is_compiling():
        return _tree_attention(q, k_cache, v_cache, kv_len, ancestors, scale)
    if not kernel:
        return reference.tree_attention(q, k_cache, v_cache, kv_len, ancestors, scale=scale)
    check_forward_only(q=q, k_cache=k_cache, v_cache=v_cache)
    with on_device(q):
        config = default_config(capacity, kv_heads, q.dtype)
        return launch_tree_attention(q, k_cache, v_cache, kv_len.contiguous(), ancestors.contiguous(), scale, config)
