"""What a layer of a Llama-like decoder needs between its matrix products, one launch each.

    add_rms_norm      total = residual + x,   normed = weight * total / sqrt(mean(total^2) + eps)
    rotary_write_kv   q and k turned by their position's angles, k and v written behind what a cache holds
    gated_silu        silu(gate) * up = gate * up / (1 + exp(-gate))

All read what a product wrote and write what the next reads, so what they cost is a launch and that traffic once. Plain
torch makes two to twelve launches of each, and writes what lies between.

Rotations are those of Hugging Face's Llama: element i of a head goes with element i + D / 2,

    out[i] = x[i] cos[i] - x[i + D/2] sin[i],    out[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i],    i < D / 2

with a row of `cos` and `sin` for each position, in fp32 and with whatever factor a scaled rotation has. Keys reach the
cache rotated. Sums and rotations are fp32 and rounded once; `total` is rounded before it is normed, since that is
what the next layer adds to.

A program norms one row of whatever batch, held in registers, by one binary: a row's bits do not depend on its company.
"""

import torch
import triton
import triton.language as tl

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
from .reference import decoder_ops as reference

#: The widest row that a program norms.
MOST_WIDTH = 16384

#: Tokens of one head that a program rotates, and columns that one gates.
ROTARY_ROWS = 16
GATED_COLUMNS = 1024


@triton.jit(do_not_specialize=["rows"])
def _add_rms_norm_kernel(
    x, residual, weight, normed, total, eps, rows, width,
    PARTS: tl.constexpr, ADDS: tl.constexpr, STORES: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    i_row, o_h = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_H)
    m_h = o_h < width
    o_row = i_row * width + o_h

    b_x = tl.load(x + o_row, mask=m_h, other=0.0).to(tl.float32)
    for i_part in tl.static_range(1, PARTS):
        b_x += tl.load(x + (i_part * rows.to(tl.int64) + i_row) * width + o_h, mask=m_h, other=0.0)
    if ADDS:
        b_x += tl.load(residual + o_row, mask=m_h, other=0.0).to(tl.float32)
    if STORES:
        b_total = b_x.to(total.dtype.element_ty)
        tl.store(total + o_row, b_total, mask=m_h)
        b_x = b_total.to(tl.float32)
    b_normed = b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / width + eps)
    b_normed *= tl.load(weight + o_h, mask=m_h, other=0.0).to(tl.float32)
    tl.store(normed + o_row, b_normed.to(normed.dtype.element_ty), mask=m_h)


@triton.jit(do_not_specialize=["rows", "positions_held", "capacity"])
def _rotary_write_kv_kernel(
    qkv, cos, sin, positions, k_cache, v_cache, kv_len, q, rows, positions_held, capacity, heads, kv_heads,
    stride_xb, stride_xt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
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
        b_low, b_high = rotated(b_low, b_high, b_cos, b_sin)
    if i_head < heads:
        p_q = q + ((i_b * rows + o_row) * heads + i_head) * (2 * HALF) + o_d
        tl.store(p_q, b_low, mask=m_td)
        tl.store(p_q + HALF, b_high, mask=m_td)
    else:
        o_slot = tl.load(kv_len + i_b).to(tl.int64) + o_t
        m_slot = m_td & ((o_slot >= 0) & (o_slot < capacity))[:, None]
        o_slot = o_slot[:, None]
        if i_head < heads + kv_heads:
            p_k = k_cache + i_b * stride_kb + (i_head - heads) * stride_kh + o_slot * stride_ks + o_d
            tl.store(p_k, b_low, mask=m_slot)
            tl.store(p_k + HALF, b_high, mask=m_slot)
        else:
            p_v = v_cache + i_b * stride_vb + (i_head - heads - kv_heads) * stride_vh + o_slot * stride_vs + o_d
            tl.store(p_v, b_low, mask=m_slot)
            tl.store(p_v + HALF, b_high, mask=m_slot)


@triton.jit
def rotated(b_low, b_high, b_cos, b_sin):
    """The two halves of heads turned by angles whose cosines and sines are fp32, in the halves' own dtype."""
    b_a, b_b = b_low.to(tl.float32), b_high.to(tl.float32)
    return (b_a * b_cos - b_b * b_sin).to(b_low.dtype), (b_b * b_cos + b_a * b_sin).to(b_low.dtype)


@triton.jit
def gated(b_gate, b_up):
    """silu(gate) * up of fp32 values."""
    return b_gate / (1.0 + tl.exp(-b_gate)) * b_up


@triton.jit
def _gated_silu_kernel(gate_up, out, width, BLOCK_I: tl.constexpr):
    i_row, o_i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_i = o_i < width
    p_row = gate_up + i_row * 2 * width + o_i
    b_gate = tl.load(p_row, mask=m_i, other=0.0).to(tl.float32)
    b_up = tl.load(p_row + width, mask=m_i, other=0.0).to(tl.float32)
    tl.store(out + i_row * width + o_i, gated(b_gate, b_up).to(out.dtype.element_ty), mask=m_i)


def launch_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel; arguments as in `add_rms_norm`, already checked."""
    parts, shape = (x.shape[0] if x.dim() == 4 else 1), x.shape[-3:]
    rows, width, given = shape[0] * shape[1], shape[2], x
    x = x.contiguous()
    normed = torch.empty(shape, dtype=weight.dtype, device=x.device)
    stores = residual is not None or x.dim() == 4
    total = torch.empty(shape, dtype=weight.dtype, device=x.device) if stores else given
    block = triton.next_power_of_2(width)
    if normed.numel():
        _add_rms_norm_kernel[(rows,)](
            x, None if residual is None else residual.contiguous(), weight.contiguous(), normed, total, eps, rows,
            width, PARTS=parts, ADDS=residual is not None, STORES=stores, BLOCK_H=block,
            num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
    return normed, total


def launch_rotary_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
) -> torch.Tensor:
    """Runs the kernel; arguments as in `rotary_write_kv`, already checked."""
    batch, rows, width = qkv.shape
    _, kv_heads, capacity, head_dim = k_cache.shape
    heads = width // head_dim - 2 * kv_heads
    q = torch.empty((batch, rows, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if qkv.numel():
        _rotary_write_kv_kernel[(triton.cdiv(rows, ROTARY_ROWS), heads + 2 * kv_heads, batch)](
            qkv, cos.contiguous(), sin.contiguous(), positions.contiguous(), k_cache, v_cache, kv_len.contiguous(), q,
            rows, cos.shape[0], capacity, heads, kv_heads,
            *qkv.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            HALF=head_dim // 2, BLOCK_T=ROTARY_ROWS, BLOCK_D=triton.next_power_of_2(head_dim // 2), num_warps=4,
        )  # fmt: skip
    return q


def launch_gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """Runs the kernel; the argument as in `gated_silu`, already checked."""
    batch, rows, width = gate_up.shape
    out = torch.empty((batch, rows, width // 2), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        _gated_silu_kernel[(batch * rows, triton.cdiv(width // 2, GATED_COLUMNS))](
            gate_up.contiguous(), out, width // 2, BLOCK_I=GATED_COLUMNS, num_warps=4
        )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds to the residual stream and norms the sum by its root mean square.

    Args:
        x: [B, T, H] in the dtype of weight, or parts [P, B, T, H] whose sum it is, in fp32 (on CPU, where weight is
            fp64, in fp64); any strides.
        residual: [B, T, H], dtype of weight, any strides; None: nothing is added.
        weight: [H]; fp32, fp16 or bf16 (on CPU fp64 too).
        eps: is added to the mean square, at least 0.

    Returns:
        normed [B, T, H] and total [B, T, H] (x itself, where there is nothing to add), dtype of weight.

    Raises:
        ValueError: a wrong shape, dtype, device or eps. The kernel is forward only (the reference, on CPU, is not):
            where it serves, also a tensor that requires a gradient while gradients are enabled.
    """
    check_tensor("weight", weight, ("H",), FLOATS)
    kernel = takes_kernel("weight", weight)
    width, device, dtype = weight.shape[0], weight.device, weight.dtype
    if isinstance(x, torch.Tensor) and x.dim() == 4:
        check_tensor("x", x, ("P", "B", "T", width), torch.promote_types(dtype, torch.float32), device)
        if not x.shape[0]:
            raise ValueError("x: expected at least one part, got none")
    else:
        check_tensor("x", x, ("B", "T", width), dtype, device)
    if residual is not None:
        check_tensor("residual", residual, tuple(x.shape[-3:]), dtype, device)
    check_finite("eps", eps)
    if eps < 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    if not kernel:
        return reference.add_rms_norm(x, residual, weight, eps=eps)
    check_tensor("weight", weight, weight.shape, KERNEL_FLOATS)
    if width > MOST_WIDTH:
        raise ValueError(f"weight: expected at most {MOST_WIDTH} columns, got {width}")
    check_forward_only(x=x, weight=weight, **({} if residual is None else {"residual": residual}))
    with on_device(x):
        return launch_add_rms_norm(x, residual, weight, eps)


def rotary_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
) -> torch.Tensor:
    """Rotates the queries and keys of T new tokens, and writes keys and values into one layer's cache.

    Args:
        qkv: [B, T, (Hq + 2 Hkv) * D] a row's query heads, then its key heads, then its value heads; fp32, fp16 or bf16
            (on CPU fp64 too), any strides with a contiguous last axis.
        cos, sin: [P, D / 2] fp32, a row a position.
        positions: [B, T] int32, in [0, P).
        k_cache, v_cache: [B, Hkv, S, D], dtype of qkv, written in place at slots kv_len + i; any strides with a
            contiguous last axis. D is even.
        kv_len: [B] int32, stored slots, in [0, S]. It is not advanced.

    Rows that would land past slot S - 1 are dropped.

    Returns:
        the rotated queries [B, T, Hq, D], contiguous, dtype of qkv.

    Raises:
        ValueError: a wrong shape, dtype, device or stride; on CPU also kv_len outside [0, S] or positions outside
            [0, P). On a GPU such a position counts as the nearest. The kernel is forward only: where it serves, also a
            qkv that requires a gradient while gradients are enabled.
    """
    check_tensor("qkv", qkv, ("B", "T", "heads * D"), FLOATS)
    kernel = check_rotary_cache(qkv, qkv.shape[2], cos, sin, positions, k_cache, v_cache, kv_len)
    check_rows_contiguous("qkv", qkv)
    if not kernel:
        return reference.rotary_write_kv(qkv, cos, sin, positions, k_cache, v_cache, kv_len)
    check_forward_only(qkv=qkv)
    with on_device(qkv):
        return launch_rotary_write_kv(qkv, cos, sin, positions, k_cache, v_cache, kv_len)


def check_rotary_cache(
    x: torch.Tensor,
    width: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
) -> bool:
    """Checks what rotates and stores heads of `width` columns in all, made of x [B, T, ...]; True where a kernel
    serves."""
    kernel = takes_kernel("x", x)
    if kernel:
        check_tensor("x", x, x.shape, KERNEL_FLOATS)
    batch, rows, device = x.shape[0], x.shape[1], x.device
    check_tensor("k_cache", k_cache, (batch, "Hkv", "S", "D"), x.dtype, device)
    check_tensor("v_cache", v_cache, tuple(k_cache.shape), x.dtype, device)
    _, kv_heads, capacity, head_dim = k_cache.shape
    if head_dim == 0 or head_dim % 2:
        raise ValueError(f"k_cache: expected an even head size, got {head_dim}")
    if width % head_dim or width // head_dim <= 2 * kv_heads:
        raise ValueError(
            f"qkv: expected heads of {head_dim}, {kv_heads} of keys, {kv_heads} of values and more of queries, got "
            f"{width} columns"
        )
    check_tensor("cos", cos, ("P", head_dim // 2), torch.float32, device)
    check_tensor("sin", sin, tuple(cos.shape), torch.float32, device)
    if not cos.shape[0]:
        raise ValueError("cos: expected a row for at least one position, got none")
    check_tensor("positions", positions, (batch, rows), torch.int32, device)
    check_tensor("kv_len", kv_len, (batch,), torch.int32, device)
    check_rows_contiguous("k_cache", k_cache)
    check_rows_contiguous("v_cache", v_cache)
    check_range("positions", positions, 0, cos.shape[0])
    check_range("kv_len", kv_len, 0, capacity + 1)
    return kernel


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """The gated activation of a feed-forward layer, silu(gate) * up.

    Args:
        gate_up: [B, T, 2 * I], the gate's columns first; fp32, fp16 or bf16 (on CPU fp64 too), any strides.

    Returns:
        [B, T, I], contiguous, dtype of gate_up.

    Raises:
        ValueError: a wrong shape, dtype or device. The kernel is forward only: where it serves, also a gate_up that
            requires a gradient while gradients are enabled.
    """
    check_tensor("gate_up", gate_up, ("B", "T", "2 * I"), FLOATS)
    if gate_up.shape[2] % 2:
        raise ValueError(f"gate_up: expected an even number of columns, got {gate_up.shape[2]}")
    if not takes_kernel("gate_up", gate_up):
        return reference.gated_silu(gate_up)
    check_tensor("gate_up", gate_up, gate_up.shape, KERNEL_FLOATS)
    check_forward_only(gate_up=gate_up)
    with on_device(gate_up):
        return launch_gated_silu(gate_up)
