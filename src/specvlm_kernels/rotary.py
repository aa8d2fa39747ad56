"""Queries and keys turned by their position's angles, keys and values written behind what a cache holds, in one launch.

    rotary_write_kv   of what a product left
    rotary_linear     q, k, v = x W^T + b, made in the same launch

Rotations are those of Hugging Face's Llama: element i of a head goes with element i + D / 2,

    out[i] = x[i] cos[i] - x[i + D/2] sin[i],    out[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i],    i < D / 2

with a row of `cos` and `sin` for each position, in fp32 and with whatever factor a scaled rotation has. Keys reach the
cache rotated. Sums and rotations are fp32 and rounded once; for a cache of 8 bits, as in
`write_kv`, what was rounded is divided by its scale and rounded again.

Inside `torch.compile` each is one operator, which gives no gradient.
"""

import torch
import triton
import triton.language as tl

from ._checks import FLOATS, KERNEL_FLOATS, check_forward_only, check_range, check_rows_contiguous, check_tensor
from ._dispatch import on_device, takes_kernel
from .decoder_linear import LinearConfig, check_product, cut, linear_config, pair_sums, stored
from .fp8 import FP8, as_bytes, check_scale, scale_stride, store_rows
from .reference import rotary as reference

#: Tokens of one head that a program rotates.
ROTARY_ROWS = 16


@triton.jit
def _rotated(b_low, b_high, b_cos, b_sin):
    """The two halves of heads turned by angles whose cosines and sines are fp32, in the halves' own dtype."""
    b_a, b_b = b_low.to(tl.float32), b_high.to(tl.float32)
    return (b_a * b_cos - b_b * b_sin).to(b_low.dtype), (b_b * b_cos + b_a * b_sin).to(b_low.dtype)


@triton.jit(do_not_specialize=["rows", "positions_held", "capacity"])
def _rotary_write_kv_kernel(
    qkv, cos, sin, positions, k_cache, v_cache, kv_len, k_scale, v_scale, q,
    rows, positions_held, capacity, heads, kv_heads, stride_xb, stride_xt,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    K_SCALE_STRIDE: tl.constexpr, V_SCALE_STRIDE: tl.constexpr,
    HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_head, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_t, o_d = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)[None, :]
    m_t = o_t < rows
    m_td = m_t[:, None] & (o_d < HALF)
    o_row = o_t.to(tl.int64)[:, None]

    p_x = qkv + i_b * stride_xb + o_row * stride_xt + i_head * (2 * HALF) + o_d
    b_low = tl.load(p_x, mask=m_td)
    b_high = tl.load(p_x + HALF, mask=m_td)
    if i_head < heads + kv_heads:
        b_position = tl.load(positions + i_b * rows + o_t, mask=m_t, other=0)
        # Clamped, so that a bad position reads the tables and nothing else.
        b_position = tl.minimum(tl.maximum(b_position, 0), positions_held - 1).to(tl.int64)[:, None]
        b_cos = tl.load(cos + b_position * HALF + o_d, mask=m_td)
        b_sin = tl.load(sin + b_position * HALF + o_d, mask=m_td)
        b_low, b_high = _rotated(b_low, b_high, b_cos, b_sin)
    if i_head < heads:
        p_q = q + ((i_b * rows + o_row) * heads + i_head) * (2 * HALF) + o_d
        tl.store(p_q, b_low, mask=m_td)
        tl.store(p_q + HALF, b_high, mask=m_td)
    else:
        o_slot = tl.load(kv_len + i_b).to(tl.int64) + o_t
        m_slot = m_td & ((o_slot >= 0) & (o_slot < capacity))[:, None]
        o_slot = o_slot[:, None]
        if i_head < heads + kv_heads:
            i_key = i_head - heads
            p_k = k_cache + i_b * stride_kb + i_key * stride_kh + o_slot * stride_ks + o_d
            store_rows(p_k, b_low, k_scale, i_b, i_key, K_SCALE_STRIDE, m_slot)
            store_rows(p_k + HALF, b_high, k_scale, i_b, i_key, K_SCALE_STRIDE, m_slot)
        else:
            i_value = i_head - heads - kv_heads
            p_v = v_cache + i_b * stride_vb + i_value * stride_vh + o_slot * stride_vs + o_d
            store_rows(p_v, b_low, v_scale, i_b, i_value, V_SCALE_STRIDE, m_slot)
            store_rows(p_v + HALF, b_high, v_scale, i_b, i_value, V_SCALE_STRIDE, m_slot)


@triton.jit(do_not_specialize=["rows", "tokens", "positions_held", "capacity"])
def _rotary_linear_kernel(
    x, weight, scale, bias, cos, sin, positions, k_cache, v_cache, kv_len, k_scale, v_scale, q,
    rows, tokens, columns, positions_held, capacity, heads, kv_heads, stride_w,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    K_SCALE_STRIDE: tl.constexpr, V_SCALE_STRIDE: tl.constexpr,
    HALF: tl.constexpr, CHUNKS: tl.constexpr, BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_head, i_chunk = tl.program_id(1) // CHUNKS, tl.program_id(1) % CHUNKS
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = i_chunk * BLOCK_H + tl.arange(0, BLOCK_H)
    m_m, m_d = o_m < rows, o_d < HALF
    o_w = i_head * (2 * HALF) + o_d
    b_low, b_high = pair_sums(
        x, weight, scale, o_m, rows, o_w, o_w + HALF, m_d, 0, columns, columns, stride_w,
        EVEN_K, BLOCK_M, BLOCK_H, BLOCK_K, STAGES,
    )  # fmt: skip
    if BIAS:
        b_low += tl.load(bias + o_w, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_high += tl.load(bias + o_w + HALF, mask=m_d, other=0.0).to(tl.float32)[None, :]

    m_md, o_d = m_m[:, None] & m_d[None, :], o_d[None, :]
    if i_head < heads + kv_heads:
        b_position = tl.load(positions + o_m, mask=m_m, other=0)
        # Clamped, so that a bad position reads the tables and nothing else.
        b_position = tl.minimum(tl.maximum(b_position, 0), positions_held - 1).to(tl.int64)[:, None]
        b_cos = tl.load(cos + b_position * HALF + o_d, mask=m_md, other=0.0)
        b_sin = tl.load(sin + b_position * HALF + o_d, mask=m_md, other=0.0)
        b_low, b_high = _rotated(b_low, b_high, b_cos, b_sin)
    b_low, b_high = b_low.to(q.dtype.element_ty), b_high.to(q.dtype.element_ty)
    if i_head < heads:
        p_q = q + (o_m.to(tl.int64)[:, None] * heads + i_head) * (2 * HALF) + o_d
        tl.store(p_q, b_low, mask=m_md)
        tl.store(p_q + HALF, b_high, mask=m_md)
    else:
        o_b = tl.minimum(o_m, rows - 1) // tokens
        o_slot = tl.load(kv_len + o_b).to(tl.int64) + o_m % tokens
        m_slot = m_md & ((o_slot >= 0) & (o_slot < capacity))[:, None]
        o_b, o_slot = o_b.to(tl.int64)[:, None], o_slot[:, None]
        if i_head < heads + kv_heads:
            i_key = (i_head - heads).to(tl.int64)
            p_k = k_cache + o_b * stride_kb + i_key * stride_kh + o_slot * stride_ks + o_d
            store_rows(p_k, b_low, k_scale, o_b, i_key, K_SCALE_STRIDE, m_slot)
            store_rows(p_k + HALF, b_high, k_scale, o_b, i_key, K_SCALE_STRIDE, m_slot)
        else:
            i_value = (i_head - heads - kv_heads).to(tl.int64)
            p_v = v_cache + o_b * stride_vb + i_value * stride_vh + o_slot * stride_vs + o_d
            store_rows(p_v, b_low, v_scale, o_b, i_value, V_SCALE_STRIDE, m_slot)
            store_rows(p_v + HALF, b_high, v_scale, o_b, i_value, V_SCALE_STRIDE, m_slot)


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _queries(x: torch.Tensor, width: int, k_cache: torch.Tensor) -> torch.Tensor:
    """Room for the queries among heads of `width` columns in all, made of x [B, T, ...]."""
    (batch, tokens, _), (_, kv_heads, _, head_dim) = x.shape, k_cache.shape
    shape = batch, tokens, width // head_dim - 2 * kv_heads, head_dim
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def launch_rotary_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs the kernel; arguments as in `rotary_write_kv`, already checked."""
    (batch, rows, width), (_, kv_heads, capacity, head_dim) = qkv.shape, k_cache.shape
    q = _queries(qkv, width, k_cache)
    heads = q.shape[2]
    if qkv.numel():
        _rotary_write_kv_kernel[(triton.cdiv(rows, ROTARY_ROWS), heads + 2 * kv_heads, batch)](
            qkv, cos.contiguous(), sin.contiguous(), positions.contiguous(), as_bytes(k_cache), as_bytes(v_cache),
            kv_len.contiguous(), _contiguous(k_scale), _contiguous(v_scale), q,
            rows, cos.shape[0], capacity, heads, kv_heads,
            *qkv.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            K_SCALE_STRIDE=scale_stride(k_scale), V_SCALE_STRIDE=scale_stride(v_scale),
            HALF=head_dim // 2, BLOCK_T=ROTARY_ROWS, BLOCK_D=triton.next_power_of_2(head_dim // 2), num_warps=4,
        )  # fmt: skip
    return q


def launch_rotary_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    *,
    config: LinearConfig,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs the kernel with an explicit cut; arguments as in `rotary_linear`, already checked."""
    (batch, tokens, columns), (_, kv_heads, capacity, head_dim) = x.shape, k_cache.shape
    q = _queries(x, weight.shape[0], k_cache)
    heads = q.shape[2]
    if q.numel():
        chunks = triton.cdiv(head_dim // 2, config.block_h)
        _rotary_linear_kernel[(triton.cdiv(batch * tokens, config.block_m), (heads + 2 * kv_heads) * chunks)](
            x.contiguous(), *stored(weight, scale), _contiguous(bias), cos.contiguous(), sin.contiguous(),
            positions.contiguous(), as_bytes(k_cache), as_bytes(v_cache), kv_len.contiguous(),
            _contiguous(k_scale), _contiguous(v_scale), q,
            batch * tokens, tokens, columns, cos.shape[0], capacity, heads, kv_heads, weight.stride(0),
            *k_cache.stride()[:3], *v_cache.stride()[:3],
            K_SCALE_STRIDE=scale_stride(k_scale), V_SCALE_STRIDE=scale_stride(v_scale),
            HALF=head_dim // 2, CHUNKS=chunks, BIAS=bias is not None, **cut(columns, config),
        )  # fmt: skip
    return q


@torch.library.custom_op("specvlm_kernels::rotary_write_kv", mutates_args=("k_cache", "v_cache"))
def _rotary_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> torch.Tensor:
    return rotary_write_kv(qkv, cos, sin, positions, k_cache, v_cache, kv_len, k_scale=k_scale, v_scale=v_scale)


@_rotary_write_kv.register_fake
def _(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    *_: torch.Tensor | None,
) -> torch.Tensor:
    return _queries(qkv, qkv.shape[2], k_cache)


@torch.library.custom_op("specvlm_kernels::rotary_linear", mutates_args=("k_cache", "v_cache"))
def _rotary_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
) -> torch.Tensor:
    scales = {"k_scale": k_scale, "v_scale": v_scale, "weight_scale": weight_scale}
    return rotary_linear(x, weight, bias, cos, sin, positions, k_cache, v_cache, kv_len, **scales)


@_rotary_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    *_: torch.Tensor | None,
) -> torch.Tensor:
    return _queries(x, weight.shape[0], k_cache)


def rotary_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates the queries and keys of T new tokens, and writes keys and values into one layer's cache.

    Args:
        qkv: [B, T, (Hq + 2 Hkv) * D] a row's query heads, then its key heads, then its value heads; fp32, fp16 or bf16
            (on CPU fp64 too), any strides with a contiguous last axis.
        cos, sin: [P, D / 2] fp32, a row a position.
        positions: [B, T] int32, in [0, P).
        k_cache, v_cache: [B, Hkv, S, D], dtype of qkv or float8_e4m3fn (not of fp64), written in place at slots
            kv_len + i; any strides with a contiguous last axis. D is even.
        kv_len: [B] int32, stored slots, in [0, S]. It is not advanced.
        k_scale, v_scale: as in `write_kv`, if and only if the caches are float8_e4m3fn.

    Rows that would land past slot S - 1 are dropped.

    Returns:
        the rotated queries [B, T, Hq, D], contiguous, dtype of qkv.

    Raises:
        ValueError: a wrong shape, dtype, device or stride; on CPU also kv_len outside [0, S] or positions outside
            [0, P). On a GPU such a position counts as the nearest. The kernel is forward only: where it serves, also a
            qkv that requires a gradient while gradients are enabled.
    """
    check_tensor("qkv", qkv, ("B", "T", "heads * D"), FLOATS)
    kernel = _check_rotary_cache(
        ("qkv", "qkv"), qkv, qkv.shape[2], cos, sin, positions, k_cache, v_cache, kv_len, k_scale, v_scale
    )
    check_rows_contiguous("qkv", qkv)
    if kernel:
        check_forward_only(qkv=qkv)
    if torch.compiler.is_compiling():
        return _rotary_write_kv(qkv, cos, sin, positions, k_cache, v_cache, kv_len, k_scale, v_scale)
    if not kernel:
        return reference.rotary_write_kv(
            qkv, cos, sin, positions, k_cache, v_cache, kv_len, k_scale=k_scale, v_scale=v_scale
        )
    with on_device(qkv):
        return launch_rotary_write_kv(qkv, cos, sin, positions, k_cache, v_cache, kv_len, k_scale, v_scale)


def rotary_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Makes queries, keys and values of few rows, rotates queries and keys, and writes keys and values into a cache.

    Args:
        x: [B, T, K]; fp32, fp16 or bf16 (on CPU fp64 too), any strides.
        weight: [(Hq + 2 Hkv) * D, K], rows of query heads, of key heads, of value heads, dtype of x or float8_e4m3fn,
            with a contiguous last axis.
        bias: [(Hq + 2 Hkv) * D], dtype of x, or None.
        cos, sin, positions, k_cache, v_cache, kv_len, k_scale, v_scale: as in `rotary_write_kv`.
        weight_scale: as in `linear`, [(Hq + 2 Hkv) * D].

    Rows that would land past slot S - 1 are dropped.

    Returns:
        the rotated queries [B, T, Hq, D], contiguous, dtype of x.

    Raises:
        ValueError: as in `linear` and `rotary_write_kv`.
    """
    kernel = check_product(x, weight, bias, weight_scale)
    _check_rotary_cache(
        ("x", "weight"), x, weight.shape[0], cos, sin, positions, k_cache, v_cache, kv_len, k_scale, v_scale
    )
    given = x, weight, bias, cos, sin, positions, k_cache, v_cache, kv_len
    if torch.compiler.is_compiling():
        return _rotary_linear(*given, k_scale, v_scale, weight_scale)
    if not kernel:
        return reference.rotary_linear(*given, k_scale=k_scale, v_scale=v_scale, weight_scale=weight_scale)
    with on_device(x):
        config = linear_config(weight.shape[0] // 2, x.dtype, weight.dtype)
        return launch_rotary_linear(*given, k_scale, v_scale, config=config, scale=weight_scale)


def _check_rotary_cache(
    names: tuple[str, str],
    x: torch.Tensor,
    width: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> bool:
    """Checks what rotates and stores heads of `width` columns in all, made of x [B, T, ...], which the caller knows
    by these names; True where a kernel serves."""
    name, heads_name = names
    kernel = takes_kernel(name, x)
    if kernel:
        check_tensor(name, x, x.shape, KERNEL_FLOATS)
    batch, rows, device = x.shape[0], x.shape[1], x.device
    check_tensor("k_cache", k_cache, (batch, "Hkv", "S", "D"), (x.dtype, FP8), device)
    check_tensor("v_cache", v_cache, tuple(k_cache.shape), k_cache.dtype, device)
    if k_cache.dtype == FP8:
        check_tensor(name, x, x.shape, KERNEL_FLOATS)
    _, kv_heads, capacity, head_dim = k_cache.shape
    if head_dim == 0 or head_dim % 2:
        raise ValueError(f"k_cache: expected an even head size, got {head_dim}")
    if not kv_heads:
        raise ValueError("k_cache: expected at least one head, got none")
    if width % head_dim or width // head_dim <= 2 * kv_heads:
        raise ValueError(
            f"{heads_name}: expected heads of {head_dim}, {kv_heads} of keys, {kv_heads} of values and more of "
            f"queries, got {width} numbers"
        )
    check_tensor("cos", cos, ("P", head_dim // 2), torch.float32, device)
    check_tensor("sin", sin, tuple(cos.shape), torch.float32, device)
    if not cos.shape[0]:
        raise ValueError("cos: expected a row for at least one position, got none")
    check_tensor("positions", positions, (batch, rows), torch.int32, device)
    check_tensor("kv_len", kv_len, (batch,), torch.int32, device)
    check_rows_contiguous("k_cache", k_cache)
    check_rows_contiguous("v_cache", v_cache)
    check_scale("k_scale", k_scale, k_cache, batch, kv_heads)
    check_scale("v_scale", v_scale, v_cache, batch, kv_heads)
    check_range("positions", positions, 0, cos.shape[0])
    check_range("kv_len", kv_len, 0, capacity + 1)
    return kernel
