"""Attention of a draft tree's nodes over a cached prefix and over the tree itself.

Row i of q is one node. With `n` = kv_len slots of prefix and `A_i` the node's ancestor bits,

    visible(i, s) = s < n  or  bit s - n of A_i,        out_i = sum_s softmax_s(scale * q_i . k_s) v_s

A tree mask over the whole slab would be Q * S entries, built anew every round; here it is Q * ceil(N / 64) words.
The keys fall into two runs. Tiles that end at or before slot n are seen by every row: they carry no mask at all. Only
the last few tiles, those that reach into the tree, test bits: a tile of up to 64 slots takes its 64 bits of a row from
two neighbouring words, where words before the tree count as all ones and words after it as zero. So an odd n costs a
shift, and the prefix's last slots need no case of their own.

The flash-decoding split: a program takes `split` keys of one KV head, computes a softmax of its own, and
leaves a normalised row and the log2 of its sum; a second kernel weighs the parts with `2^(lse - max lse)`, or the last
program to be done does (see `TreeAttentionConfig`). Programs whose keys nobody stored return at once, and what merges
looks at none of them. All query heads that share a KV head lie in one tile (row = node * group + head), so a key is
read once for `BLOCK_M` rows. Partials are fp32, 4 * (D + 1) bytes a row and split: they stay in L2. One split means no
partials and no second kernel. Tensor cores take 64 rows at a time whether they exist or not: for few rows that costs
nothing while the keys are still on their way, and a lower tile would round otherwise than a full one.

**A row's bits do not depend on its company.** Split and tile borders follow from the slab's capacity, a model's head
count and absolute slots alone. Nor does Triton compile anew for another company: Q, the words a row and q's strides are
arguments that nothing is specialised on, kv_len and ancestors are not specialised on their alignment. Given dense rows
and one slab, the same machine code computes a row alone, among 64, or in another batch. Where more rows take a taller
tile (see `default_config`), the floating-point instructions that a row goes through are the same, in the same order.
"""

import math
from typing import Literal, overload

import torch
import triton
import triton.language as tl

from . import reference
from ._checks import (
    FLOATS,
    KERNEL_FLOATS,
    check_finite,
    check_forward_only,
    check_range,
    check_rows_contiguous,
    check_tensor,
)
from ._dispatch import on_device, takes_kernel
from .attention_config import TreeAttentionConfig, default_config
from .fp8 import FP8, as_bytes, check_scale, decode, is_native, load_scale, scale_stride

#: exp(x) = 2^(x * LOG2_E): the kernels keep scores and sums in base 2, which is what the hardware computes.
LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)

#: Rows that one program of the merge handles.
MERGE_ROWS = 4

#: Head sizes, from and to.
HEAD_DIMS = (32, 128)


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
def _load_tile(p_slab, start, stride, m_slot, dtype: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """[BLOCK_N, BLOCK_D] of one head's keys or values from slot `start` on, in `dtype`; `m_slot`: see MASKED."""
    o_slot, o_d = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)[None, :]
    p_tile = p_slab + o_slot.to(tl.int64)[:, None] * stride + o_d
    if MASKED:
        b_tile = tl.load(p_tile, mask=m_slot[:, None] & (o_d < D), other=0.0)
    elif D == BLOCK_D:
        b_tile = tl.load(p_tile)
    else:
        b_tile = tl.load(p_tile, mask=o_d < D, other=0.0)
    return decode(b_tile, dtype)


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


@triton.jit
def _merge(part, part_lse, o_row, m_row, used, splits, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `o_row` of the first `used` splits, weighed: their result [ROWS, BLOCK_D] and the log2 of their sums."""
    o_d = tl.arange(0, BLOCK_D)
    m_rd = m_row[:, None] & (o_d < D)[None, :]
    b_max = tl.full([ROWS], -float("inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i_split in range(used):
        o_part = o_row.to(tl.int64) * splits + i_split
        # Past the first-level cache: another multiprocessor may just have written them.
        b_lse = tl.load(part_lse + o_part, mask=m_row, other=-float("inf"), cache_modifier=".cg")
        b_part = tl.load(part + o_part[:, None] * D + o_d[None, :], mask=m_rd, other=0.0, cache_modifier=".cg")
        b_new = tl.maximum(b_max, b_lse)
        b_base = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_shrink, b_weight = tl.exp2(b_max - b_base), tl.exp2(b_lse - b_base)
        b_sum = b_sum * b_shrink + b_weight
        b_out = b_out * b_shrink[:, None] + b_weight[:, None] * b_part
        b_max = b_new
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    return b_out / b_sum[:, None], b_max + tl.log2(b_sum)


@triton.jit
def _store_rows(out, lse, o_row, m_row, b_out, b_lse, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A result, and the natural logarithms of its sums where these are asked for."""
    o_d = tl.arange(0, BLOCK_D)
    m_rd = m_row[:, None] & (o_d < D)[None, :]
    tl.store(out + o_row[:, None] * D + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_rd)
    if lse is not None:
        tl.store(lse + o_row, b_lse * LN_2, mask=m_row)


@triton.jit(
    do_not_specialize=["queries", "kv_heads", "words", "capacity", "splits", "stride_qb", "stride_qn", "stride_qh"],
    do_not_specialize_on_alignment=["kv_len", "ancestors", "k_scale", "v_scale", "lse"],
)
def _tree_attention_kernel(
    q, k_cache, v_cache, kv_len, ancestors, k_scale, v_scale, out, lse, part, part_lse, arrivals, scale_log2,
    queries, kv_heads, words, capacity, splits, split,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    GROUP: tl.constexpr, D: tl.constexpr, Q_UNIT: tl.constexpr, ONE_SPLIT: tl.constexpr,
    K_SCALE_STRIDE: tl.constexpr, V_SCALE_STRIDE: tl.constexpr,
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
    scale_log2 *= load_scale(k_scale, i_b, i_head, K_SCALE_STRIDE)
    dtype: tl.constexpr = q.dtype.element_ty

    b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    whole = tl.maximum(first, tl.minimum(last, n // BLOCK_N * BLOCK_N))  # before it: tiles of prefix only
    for start in tl.range(first, whole, BLOCK_N, num_stages=STAGES):
        b_k = _load_tile(p_k, start, stride_ks, None, dtype, False, D, BLOCK_N, BLOCK_D)
        b_v = _load_tile(p_v, start, stride_vs, None, dtype, False, D, BLOCK_N, BLOCK_D)
        b_max, b_sum, b_out = _attend(b_q, b_k, b_v, b_max, b_sum, b_out, scale_log2, None, False)

    p_words = ancestors + i_b * queries * words
    for start in tl.range(whole, last, BLOCK_N, num_stages=1):
        b_bits = _tile_bits(p_words, i_node, m_row, words, start - n, capacity - start)
        # A slot that no row names may hold anything, NaN too, and 0 * NaN is NaN: it is not read.
        m_slot = _unpack(tl.reduce_or(b_bits, 0), o_n)
        b_k = _load_tile(p_k, start, stride_ks, m_slot, dtype, True, D, BLOCK_N, BLOCK_D)
        b_v = _load_tile(p_v, start, stride_vs, m_slot, dtype, True, D, BLOCK_N, BLOCK_D)
        m_seen = _unpack(b_bits[:, None], o_n[None, :])
        b_max, b_sum, b_out = _attend(b_q, b_k, b_v, b_max, b_sum, b_out, scale_log2, m_seen, True)

    # A row that saw nothing leaves zeros and, its maximum being -inf, the weight 2^-inf.
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None] * load_scale(v_scale, i_b, i_head, V_SCALE_STRIDE)
    b_lse = b_max + tl.log2(b_sum)
    o_out = (i_b * queries + i_node) * (kv_heads * GROUP) + i_q_head
    if ONE_SPLIT:
        _store_rows(out, lse, o_out, m_row, b_out, b_lse, D, BLOCK_D)
    else:
        o_part = o_out * splits + i_split
        tl.store(part_lse + o_part, b_lse, mask=m_row)
        tl.store(part + o_part[:, None] * D + o_d[None, :], b_out, mask=m_row[:, None] & m_d[None, :])
        if arrivals is not None:
            # All of the program's partials are written before it says so, and the last to say so reads everybody's.
            tl.debug_barrier()
            used = tl.maximum(tl.cdiv(tl.minimum(n + words * 64, capacity), split), 1)
            p_arrived = arrivals + (i_b * kv_heads + i_head) * tl.num_programs(0) + i_tile
            if tl.atomic_add(p_arrived, 1, sem="acq_rel") == used - 1:
                tl.store(p_arrived, 0)
                b_out, b_lse = _merge(part, part_lse, o_out, m_row, used, splits, D, BLOCK_M, BLOCK_D)
                _store_rows(out, lse, o_out, m_row, b_out, b_lse, D, BLOCK_D)


@triton.jit(do_not_specialize=["rows", "words", "capacity", "splits"], do_not_specialize_on_alignment=["kv_len", "lse"])
def _tree_attention_merge_kernel(
    part, part_lse, kv_len, out, lse, rows, words, capacity, splits, split,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(1).to(tl.int64)
    n = tl.minimum(tl.maximum(tl.load(kv_len + i_b), 0), capacity)
    used = tl.cdiv(tl.minimum(n + words * 64, capacity), split)  # later splits wrote nothing
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_out, b_lse = _merge(part, part_lse, i_b * rows + o_r, o_r < rows, used, splits, D, BLOCK_R, BLOCK_D)
    _store_rows(out, lse, i_b * rows + o_r, o_r < rows, b_out, b_lse, D, BLOCK_D)


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
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs the kernels with an explicit cut; arguments as in `tree_attention`, already checked.

    Args:
        lse: [B, Q, Hq] float32, filled with each row's log-sum-exp; None: it is not wanted.
        arrivals: where the last arriver merges: int32 zeros, as many as `count_arrivals` says, and zeros again after
            the call, for one stream at a time. None: made for this call, which costs a fill.
    """
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
    if one_split or not config.last_merges:
        arrivals = None
    elif arrivals is None:
        arrivals = torch.zeros(count_arrivals(q, kv_heads, config), dtype=torch.int32, device=q.device)
    if k_cache.dtype == FP8 and not is_native():
        k_cache, v_cache = as_bytes(k_cache), as_bytes(v_cache)
    block_d = triton.next_power_of_2(head_dim)
    q_strides = _strides(q)
    q_unit = math.gcd(16, head_dim, *q_strides)
    grid = (triton.cdiv(queries * group, config.block_m), kv_heads * splits, batch)
    _tree_attention_kernel[grid](
        q, k_cache, v_cache, kv_len, ancestors, k_scale, v_scale, out, lse, part, part_lse, arrivals, scale * LOG2_E,
        queries, kv_heads, words, capacity, splits, config.split,
        *(stride // q_unit for stride in q_strides), *_strides(k_cache), *_strides(v_cache),
        GROUP=group, D=head_dim, Q_UNIT=q_unit, ONE_SPLIT=one_split,
        K_SCALE_STRIDE=scale_stride(k_scale), V_SCALE_STRIDE=scale_stride(v_scale),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d, STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip
    if not one_split and not config.last_merges:
        rows = queries * heads
        _tree_attention_merge_kernel[(triton.cdiv(rows, MERGE_ROWS), batch)](
            part, part_lse, kv_len, out, lse, rows, words, capacity, splits, config.split,
            D=head_dim, BLOCK_R=MERGE_ROWS, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out


def count_arrivals(q: torch.Tensor, kv_heads: int, config: TreeAttentionConfig) -> int:
    """How many counters the programs of a call with q [B, Q, Hq, D] need, where the last arriver merges."""
    batch, queries, heads, _ = q.shape
    return batch * kv_heads * triton.cdiv(queries * (heads // kv_heads), config.block_m)


@torch.library.custom_op("specvlm_kernels::tree_attention", mutates_args=())
def _tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    ancestors: torch.Tensor,
    scale: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    return_lse: bool,
) -> list[torch.Tensor]:
    """The result, and the log-sum-exps where these are wanted."""
    tensors = q, k_cache, v_cache, kv_len, ancestors
    if not return_lse:
        return [tree_attention(*tensors, scale=scale, k_scale=k_scale, v_scale=v_scale)]
    return [*tree_attention(*tensors, scale=scale, k_scale=k_scale, v_scale=v_scale, return_lse=True)]


@_tree_attention.register_fake
def _(q: torch.Tensor, *arguments: object) -> list[torch.Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return [out, lse] if arguments[-1] else [out]


@overload
def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    ancestors: torch.Tensor,
    *,
    scale: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
) -> torch.Tensor: ...
@overload
def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    ancestors: torch.Tensor,
    *,
    scale: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    ancestors: torch.Tensor,
    *,
    scale: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attends every node to the cached prefix and to its own ancestors in the tree.

    A row sees the slots before kv_len and slot kv_len + j for every bit j that it names. Verifying, Q is the tree's
    size; growing a tree, Q is the number of new nodes and `ancestors` their rows. Keys and values of the nodes are
    written before the call (`write_kv`). Slots that no row sees, and slots past the capacity, may hold anything.

    Args:
        q: [B, Q, Hq, D], D from 32 to 128; fp32, fp16 or bf16 (on CPU fp64 too). Any strides with a contiguous last
            axis.
        k_cache, v_cache: [B, Hkv, S, D], dtype of q or both float8_e4m3fn, Hkv a divisor of Hq. Strides as for q.
        kv_len: [B] int32, stored slots, in [0, S].
        ancestors: [B, Q, W] int64 as `pack_ancestors` makes them.
        scale: of the scores, a finite number; None: D ** -0.5.
        k_scale, v_scale: [Hkv] or [B, Hkv] float32, above 0: what stored float8 keys and values are multiplied by
            (`write_kv` divides by it). Given if and only if the caches are float8.
        return_lse: whether to return the log-sum-exp too.

    Returns:
        [B, Q, Hq, D], contiguous, dtype of q. A row that sees no slot at all is zero. With return_lse, a pair: that,
        and `log(sum_s exp(scale * q . k_s))` over the slots that a row sees, [B, Q, Hq] float32 (of fp64: fp64), -inf
        where it sees none. Two results over disjoint slots are merged by `w = sigmoid(lse_a - lse_b)`,
        `w * a + (1 - w) * b`.

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
    check_tensor("k_cache", k_cache, (batch, "Hkv", "S", head_dim), (q.dtype, FP8), device)
    check_tensor("v_cache", v_cache, tuple(k_cache.shape), k_cache.dtype, device)
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
    check_scale("k_scale", k_scale, k_cache, batch, kv_heads)
    check_scale("v_scale", v_scale, v_cache, batch, kv_heads)
    check_range("kv_len", kv_len, 0, capacity + 1)
    if scale is None:
        scale = head_dim**-0.5
    check_finite("scale", scale)
    if torch.compiler.is_compiling():
        found = _tree_attention(q, k_cache, v_cache, kv_len, ancestors, scale, k_scale, v_scale, return_lse)
        return (found[0], found[1]) if return_lse else found[0]
    if not kernel:
        return reference.tree_attention(
            q, k_cache, v_cache, kv_len, ancestors,
            scale=scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse,
        )  # fmt: skip
    check_forward_only(q=q, k_cache=k_cache, v_cache=v_cache)
    lse = torch.empty((batch, queries, heads), dtype=torch.float32, device=device) if return_lse else None
    k_scale, v_scale = (None if each is None else each.contiguous() for each in (k_scale, v_scale))
    with on_device(q):
        rows = queries * (heads // kv_heads)
        config = default_config(capacity, kv_heads, q.dtype, rows, cache_dtype=k_cache.dtype)
        out = launch_tree_attention(
            q, k_cache, v_cache, kv_len.contiguous(), ancestors.contiguous(), scale,
            config, k_scale=k_scale, v_scale=v_scale, lse=lse,
        )  # fmt: skip
    return out if lse is None else (out, lse)
