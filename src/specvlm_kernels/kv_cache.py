"""Writes new keys and values into the cache, and moves an accepted path of a tree to where it belongs.

A tree's node i lives in slot kv_len + i while it is verified. Of its nodes only one path survives, and the survivors'
slots become contiguous:

    slot kv_len + path[i]  ->  slot kv_len + 1 + i,        i < length

Indices ascend along a path and path[0] >= 1, so path[i] >= i + 1: a row moves down or stays. `compact_kv` therefore
works in place, without a copy of the tree. Take moves a < b. Move b reads slot path[b] > path[a] >= a + 1, which is not
what move a writes: the rows can be moved in ascending order. And if a whole chunk of moves is read before any
of it is written, and chunks go in ascending order, nothing is overwritten before it is read. One program owns all moves
of its (layer, key or value, row, head), so a barrier inside the program between reading and writing is all it takes.
All layers go in one launch: a round moves a few rows of 256 bytes a head, so the cost is the launch.

Into a cache of 8 bits `write_kv` rounds what it divides by the head's scale; `compact_kv` moves bytes.
"""

import torch
import triton
import triton.language as tl

from . import reference
from ._checks import FLOATS, KERNEL_FLOATS, check_path, check_range, check_rows_contiguous, check_tensor
from ._dispatch import on_device, takes_kernel
from .fp8 import FP8, as_bytes, check_scale, scale_stride, store_rows

#: Rows of 2-byte values that one program moves at a time; a path is rarely longer.
MOVE_ROWS = 16
WRITE_ROWS = 16


@triton.jit(do_not_specialize=["rows", "capacity"])
def _write_kv_kernel(
    k_cache, v_cache, k, v, kv_len, k_scale, v_scale, rows, capacity,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_kb_new, stride_kh_new, stride_kt_new, stride_vb_new, stride_vh_new, stride_vt_new,
    K_SCALE_STRIDE: tl.constexpr, V_SCALE_STRIDE: tl.constexpr,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_head, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_t, o_d = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)[None, :]
    o_slot = tl.load(kv_len + i_b).to(tl.int64) + o_t
    m_td = ((o_t < rows) & (o_slot >= 0) & (o_slot < capacity))[:, None] & (o_d < D)
    o_t, o_slot = o_t.to(tl.int64)[:, None], o_slot[:, None]

    b_k = tl.load(k + i_b * stride_kb_new + i_head * stride_kh_new + o_t * stride_kt_new + o_d, mask=m_td)
    b_v = tl.load(v + i_b * stride_vb_new + i_head * stride_vh_new + o_t * stride_vt_new + o_d, mask=m_td)
    p_k = k_cache + i_b * stride_kb + i_head * stride_kh + o_slot * stride_ks + o_d
    p_v = v_cache + i_b * stride_vb + i_head * stride_vh + o_slot * stride_vs + o_d
    store_rows(p_k, b_k, k_scale, i_b, i_head, K_SCALE_STRIDE, m_td)
    store_rows(p_v, b_v, v_scale, i_b, i_head, V_SCALE_STRIDE, m_td)


@triton.jit(do_not_specialize=["nodes", "capacity", "heads"])
def _compact_kv_kernel(
    cache, kv_len, path, length, nodes, capacity, heads,
    stride_l, stride_c, stride_b, stride_h, stride_s,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_head, i_kv = (tl.program_id(0) % heads).to(tl.int64), (tl.program_id(0) // heads % 2).to(tl.int64)
    i_layer, i_b = (tl.program_id(0) // (2 * heads)).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_t, o_d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)[None, :]

    start = tl.load(kv_len + i_b).to(tl.int64)
    count = tl.minimum(tl.load(length + i_b), nodes)
    p_row = cache + i_layer * stride_l + i_kv * stride_c + i_b * stride_b + i_head * stride_h + start * stride_s + o_d
    for i_first in range(0, count, BLOCK_T):
        o_to = i_first + o_t
        b_from = tl.load(path + i_b * nodes + o_to, mask=o_to < count, other=-1)
        # Also what makes bad values harmless: a row moves down, between slots of the slab.
        m_t = (b_from > o_to + 1) & (start >= 0) & (start + b_from < capacity)
        m_td = m_t[:, None] & (o_d < D)
        b_row = tl.load(p_row + b_from.to(tl.int64)[:, None] * stride_s, mask=m_td)
        tl.debug_barrier()
        tl.store(p_row + (o_to + 1).to(tl.int64)[:, None] * stride_s, b_row, mask=m_td)


def launch_write_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Runs the kernel; arguments as in `write_kv`, already checked."""
    batch, heads, rows, head_dim = k.shape
    if k.numel() == 0:
        return
    _write_kv_kernel[(triton.cdiv(rows, WRITE_ROWS), heads, batch)](
        as_bytes(k_cache), as_bytes(v_cache), k, v, kv_len, k_scale, v_scale, rows, k_cache.shape[2],
        *k_cache.stride()[:3], *v_cache.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        K_SCALE_STRIDE=scale_stride(k_scale), V_SCALE_STRIDE=scale_stride(v_scale),
        D=head_dim, BLOCK_T=WRITE_ROWS, BLOCK_D=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip


def launch_compact_kv(cache: torch.Tensor, kv_len: torch.Tensor, path: torch.Tensor, length: torch.Tensor) -> None:
    """Runs the kernel; arguments as in `compact_kv`, already checked."""
    layers, _, batch, heads, capacity, head_dim = cache.shape
    if cache.numel() == 0 or path.numel() == 0:
        return
    _compact_kv_kernel[(layers * 2 * heads, batch)](
        as_bytes(cache), kv_len, path, length, path.shape[1], capacity, heads, *cache.stride()[:5],
        D=head_dim, BLOCK_T=MOVE_ROWS, BLOCK_D=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip


@torch.library.custom_op("specvlm_kernels::write_kv", mutates_args=("k_cache", "v_cache"))
def _write_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    write_kv(k_cache, v_cache, k, v, kv_len, k_scale=k_scale, v_scale=v_scale)


@torch.library.custom_op("specvlm_kernels::compact_kv", mutates_args=("cache",))
def _compact_kv(cache: torch.Tensor, kv_len: torch.Tensor, path: torch.Tensor, length: torch.Tensor) -> None:
    compact_kv(cache, kv_len, path, length)


@_write_kv.register_fake
@_compact_kv.register_fake
def _(*_: torch.Tensor | None) -> None:
    return None


def write_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Writes the keys and values of T new tokens into one layer's cache, behind what it holds.

    Args:
        k_cache, v_cache: [B, Hkv, S, D], written in place at slots kv_len + i; any strides with a contiguous last axis.
        k, v: [B, Hkv, T, D], dtype of the cache (fp32, fp16 or bf16 for a float8_e4m3fn cache), strides as for the
            cache (a transposed view will do).
        kv_len: [B] int32, stored slots, in [0, S]. It is not advanced.
        k_scale, v_scale: [Hkv] or [B, Hkv] float32, above 0, if and only if the caches are float8_e4m3fn: `k / k_scale`
            is stored, rounded to the nearest and at most 448 in size.

    Rows that would land past slot S - 1 are dropped.

    Raises:
        ValueError: a wrong shape, dtype, device or stride, a scale too many or missing; on CPU also kv_len outside
            [0, S].
    """
    check_tensor("k_cache", k_cache, ("B", "Hkv", "S", "D"), (*FLOATS, FP8))
    kernel = takes_kernel("k_cache", k_cache)
    check_tensor("v_cache", v_cache, k_cache.shape, k_cache.dtype, k_cache.device)
    batch, heads, capacity, head_dim = k_cache.shape
    dtypes = KERNEL_FLOATS if k_cache.dtype == FP8 else (k_cache.dtype,)
    check_tensor("k", k, (batch, heads, "T", head_dim), dtypes, k_cache.device)
    check_tensor("v", v, k.shape, k.dtype, k_cache.device)
    check_scale("k_scale", k_scale, k_cache, batch, heads)
    check_scale("v_scale", v_scale, v_cache, batch, heads)
    check_tensor("kv_len", kv_len, (batch,), torch.int32, k_cache.device)
    check_rows_contiguous("k_cache", k_cache)
    check_rows_contiguous("v_cache", v_cache)
    check_rows_contiguous("k", k)
    check_rows_contiguous("v", v)
    check_range("kv_len", kv_len, 0, capacity + 1)
    if torch.compiler.is_compiling():
        return _write_kv(k_cache, v_cache, k, v, kv_len, k_scale, v_scale)
    if not kernel:
        return reference.write_kv(k_cache, v_cache, k, v, kv_len, k_scale=k_scale, v_scale=v_scale)
    k_scale, v_scale = (None if scale is None else scale.contiguous() for scale in (k_scale, v_scale))
    with on_device(k_cache):
        return launch_write_kv(k_cache, v_cache, k, v, kv_len.contiguous(), k_scale, v_scale)


def compact_kv(cache: torch.Tensor, kv_len: torch.Tensor, path: torch.Tensor, length: torch.Tensor) -> None:
    """Moves the accepted path's keys and values to the front of the tree, in all layers at once.

    Slot kv_len + path[b, i] goes to slot kv_len + 1 + i for i < length. The root stays in slot kv_len; the caller then
    adds 1 + length to kv_len. Slots behind the path keep what they held.

    Args:
        cache: [L, 2, B, Hkv, S, D] (keys, then values), floats or float8_e4m3fn, changed in place; any strides with a
            contiguous last axis.
        kv_len: [B] int32, in [0, S].
        path: [B, N] int32 node indices as `accept` returns them: ascending, the root left out, padded with -1.
        length: [B] int32, in [0, N].

    Rows whose source lies past slot S - 1 are left out, as are (on a GPU) nodes with path[b, i] <= i.

    Raises:
        ValueError: a wrong shape, dtype, device or stride; on CPU also kv_len or length out of range, and a path that
            does not ascend from at least 1.
    """
    check_tensor("cache", cache, ("L", 2, "B", "Hkv", "S", "D"), (*FLOATS, FP8))
    kernel = takes_kernel("cache", cache)
    batch, capacity = cache.shape[2], cache.shape[4]
    check_tensor("kv_len", kv_len, (batch,), torch.int32, cache.device)
    check_tensor("path", path, (batch, "N"), torch.int32, cache.device)
    check_tensor("length", length, (batch,), torch.int32, cache.device)
    check_rows_contiguous("cache", cache)
    check_range("kv_len", kv_len, 0, capacity + 1)
    check_range("length", length, 0, path.shape[1] + 1)
    check_path(path, length)
    if torch.compiler.is_compiling():
        return _compact_kv(cache, kv_len, path, length)
    if not kernel:
        return reference.compact_kv(cache, kv_len, path, length)
    with on_device(cache):
        return launch_compact_kv(cache, kv_len.contiguous(), path.contiguous(), length.contiguous())
