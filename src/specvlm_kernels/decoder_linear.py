"""A decoder layer's matrix products for few rows, with what follows them in the same launch.

    linear          x W^T + b
    linear_parts    the same sum cut along the columns of W, which `add_rms_norm` adds up
    gated_linear    silu(x W_gate^T) * (x W_up^T)

and `rotary_linear` in a module of its own, which shares their sums.

For as many rows as a draft tree has, a product costs what reading W costs, and each launch between two of them a few
percent of that. So activation and rotation happen on the sums in registers: both join two columns, of gate and up, or
half a head apart, and a program has the two rows of W that make a pair. What is left of a layer is eight launches:
norm, q k v, attention in two, out, norm, gate and up, down.

A program streams `2 * block_h` rows of W for `block_m` rows of x, so that x, which all programs read, is at most half
of the traffic between L2 and registers. Where W has too few rows to fill the chip (out, down), its columns are cut into
parts, whose fp32 sums are written out: the next norm reads them anyway, and adds them in a fixed order.

**A row's bits do not depend on its company.** Tiles, cuts and instructions follow from W's shape and the dtype alone: a
row alone runs through the tile that 64 share. A matrix library picks another kernel for 1 row than for 64, which rounds
differently, and greedy answers then hang on how many nodes were verified along.

W may be e4m3 with a scale a row, which costs half as much to read. Its values, exact in fp16 and bf16, go into the dot
as they are, and the scale onto the sum.

Inside `torch.compile` each is one operator, which gives no gradient.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from ._checks import FLOATS, KERNEL_FLOATS, check_forward_only, check_rows_contiguous, check_tensor
from ._dispatch import on_device, takes_kernel
from .decoder_ops import gated
from .fp8 import FP8, as_bytes, decode, is_native
from .reference import decoder_linear as reference

#: Rows beyond which a matrix library's product is the better one: it is no longer the weights that cost.
FEW_ROWS = 128

#: Programs that fill a chip, how many with wide tiles are worth it, and parts a product is cut into at most for that.
FILLING_PROGRAMS, ENOUGH_PROGRAMS, MOST_PARTS = 128, 96, 8


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """How a product is cut into programs; see `linear_config`.

    Attributes:
        block_m: rows of x a program.
        block_h: pairs of rows of W a program.
        block_k: columns a step.
        num_stages: steps in flight.
    """

    block_m: int = 64
    block_h: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3


def linear_config(pairs: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> LinearConfig:
    """The cut for a weight of `pairs` pairs of rows: nothing of x but its dtype has a say. No `weight_dtype`: x's."""
    if dtype == torch.float32:  # no tensor cores: products run from registers
        return LinearConfig(block_m=32, block_h=32, block_k=32)
    config = LinearConfig(block_h=64 if pairs >= ENOUGH_PROGRAMS * 64 else 32)
    if weight_dtype != FP8:
        return config
    # As many bytes of W in flight, where a column has half as many. Decoded by hand, they need registers instead.
    return replace(config, block_k=128) if is_native() else replace(config, num_warps=8)


def parts_config(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> LinearConfig:
    """The cut for a weight that is cut along its columns besides."""
    config = linear_config(ENOUGH_PROGRAMS * 64, dtype, weight_dtype)
    # With the fp32 sums to be written besides, four warps spill on sm_100.
    return config if dtype == torch.float32 else replace(config, num_warps=8)


def parts_of(rows: int, columns: int, config: LinearConfig) -> int:
    """How many parts a product with a weight of this shape is cut into: each has columns."""
    tiles, steps = triton.cdiv(rows, 2 * config.block_h), triton.cdiv(columns, config.block_k)
    wanted = max(1, min(MOST_PARTS, FILLING_PROGRAMS // max(1, tiles), steps // 8))
    return triton.cdiv(steps, triton.cdiv(steps, wanted))


@triton.jit
def pair_sums(
    x, weight, scale, o_m, rows, o_low, o_high, m_h, first, last, columns, stride_w,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows `o_m` of x times rows `o_low` and `o_high` of W over columns first to last: two [BLOCK_M, BLOCK_H]."""
    o_k = tl.arange(0, BLOCK_K)
    m_m = (o_m < rows)[:, None]
    p_x = x + o_m.to(tl.int64)[:, None] * columns + o_k[None, :]
    p_low = weight + o_low.to(tl.int64)[:, None] * stride_w + o_k[None, :]
    p_high = weight + o_high.to(tl.int64)[:, None] * stride_w + o_k[None, :]
    b_low = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    b_high = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        m_x, m_w = m_m, m_h[:, None]
        if not EVEN_K:
            m_k = (start + o_k < columns)[None, :]
            m_x, m_w = m_x & m_k, m_w & m_k
        b_x = tl.load(p_x + start, mask=m_x, other=0.0)
        b_w = decode(tl.load(p_low + start, mask=m_w, other=0.0), b_x.dtype)
        b_low = tl.dot(b_x, tl.trans(b_w), b_low, input_precision="ieee")
        b_w = decode(tl.load(p_high + start, mask=m_w, other=0.0), b_x.dtype)
        b_high = tl.dot(b_x, tl.trans(b_w), b_high, input_precision="ieee")
    if scale is not None:
        b_low *= tl.load(scale + o_low, mask=m_h, other=0.0)[None, :]
        b_high *= tl.load(scale + o_high, mask=m_h, other=0.0)[None, :]
    return b_low, b_high


@triton.jit(do_not_specialize=["rows", "span"])
def _linear_kernel(
    x, weight, scale, bias, out, rows, columns, outputs, span, stride_w,
    BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_part, o_m = tl.program_id(2), tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_low = tl.program_id(1) * (2 * BLOCK_H) + tl.arange(0, BLOCK_H)
    o_high = o_low + BLOCK_H
    # Both halves load where the first half's rows are; the high rows past the end are read from row 0 instead.
    m_high = o_high < outputs
    first = tl.multiple_of(i_part * span, BLOCK_K)
    b_low, b_high = pair_sums(
        x, weight, scale, o_m, rows, o_low, tl.where(m_high, o_high, 0), o_low < outputs, first,
        tl.minimum(first + span, columns), columns, stride_w, EVEN_K, BLOCK_M, BLOCK_H, BLOCK_K, STAGES,
    )  # fmt: skip
    if BIAS:
        b_low += tl.load(bias + o_low, mask=o_low < outputs, other=0.0).to(tl.float32)[None, :]
        b_high += tl.load(bias + o_high, mask=m_high, other=0.0).to(tl.float32)[None, :]
    o_row = i_part.to(tl.int64) * rows + o_m
    p_out = out + o_row[:, None] * outputs
    m_m = (o_m < rows)[:, None]
    tl.store(p_out + o_low[None, :], b_low.to(out.dtype.element_ty), mask=m_m & (o_low < outputs)[None, :])
    tl.store(p_out + o_high[None, :], b_high.to(out.dtype.element_ty), mask=m_m & m_high[None, :])


@triton.jit(do_not_specialize=["rows"])
def _gated_linear_kernel(
    x, weight, scale, out, rows, columns, outputs, stride_w,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_gate = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_gate < outputs
    b_gate, b_up = pair_sums(
        x, weight, scale, o_m, rows, o_gate, o_gate + outputs, m_h, 0, columns, columns, stride_w,
        EVEN_K, BLOCK_M, BLOCK_H, BLOCK_K, STAGES,
    )  # fmt: skip
    p_out = out + o_m.to(tl.int64)[:, None] * outputs + o_gate[None, :]
    tl.store(p_out, gated(b_gate, b_up).to(out.dtype.element_ty), mask=(o_m < rows)[:, None] & m_h[None, :])


def launch_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: LinearConfig,
    parts: int | None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs the kernel with an explicit cut; arguments as in `linear`, already checked. No parts: the sum itself."""
    (batch, tokens, columns), outputs = x.shape, weight.shape[0]
    rows, steps = batch * tokens, triton.cdiv(columns, config.block_k)
    leading, dtype = ((), x.dtype) if parts is None else ((parts,), torch.float32)
    out = torch.empty((*leading, batch, tokens, outputs), dtype=dtype, device=x.device)
    if out.numel():
        grid = (triton.cdiv(rows, config.block_m), triton.cdiv(outputs, 2 * config.block_h), parts or 1)
        _linear_kernel[grid](
            x.contiguous(), *stored(weight, scale), None if bias is None else bias.contiguous(), out,
            rows, columns, outputs, triton.cdiv(steps, parts or 1) * config.block_k, weight.stride(0),
            BIAS=bias is not None, **cut(columns, config),
        )  # fmt: skip
    return out


def launch_gated_linear(
    x: torch.Tensor, weight: torch.Tensor, config: LinearConfig, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Runs the kernel with an explicit cut; arguments as in `gated_linear`, already checked."""
    (batch, tokens, columns), outputs = x.shape, weight.shape[0] // 2
    out = torch.empty((batch, tokens, outputs), dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (triton.cdiv(batch * tokens, config.block_m), triton.cdiv(outputs, config.block_h))
        _gated_linear_kernel[grid](
            x.contiguous(), *stored(weight, scale), out, batch * tokens, columns, outputs, weight.stride(0),
            **cut(columns, config),
        )  # fmt: skip
    return out


def stored(weight: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A weight as the current device reads it, and its scale."""
    if scale is None:
        return weight, None
    return weight if is_native() else as_bytes(weight), scale.contiguous()


def cut(columns: int, config: LinearConfig) -> dict[str, int]:
    """What a launch of `pair_sums` over that many columns is told of its cut."""
    return {
        "EVEN_K": columns % config.block_k == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_H": config.block_h,
        "BLOCK_K": config.block_k,
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
    }


def check_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | None) -> bool:
    """Checks what every product needs; True where a kernel serves."""
    check_tensor("x", x, ("B", "T", "K"), FLOATS)
    kernel = takes_kernel("x", x)
    check_tensor("weight", weight, ("N", x.shape[2]), (x.dtype, FP8), x.device)
    if weight.dtype == FP8:
        check_tensor("weight_scale", scale, (weight.shape[0],), torch.float32, x.device)
    elif scale is not None:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"weight_scale: expected None for a {dtype} weight, got one")
    check_rows_contiguous("weight", weight)
    if not x.shape[2]:
        raise ValueError("x: expected at least one column, got none")
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), x.dtype, x.device)
    if kernel:
        check_tensor("x", x, x.shape, KERNEL_FLOATS)
        check_forward_only(x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    return kernel


@torch.library.custom_op("specvlm_kernels::linear", mutates_args=())
def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor | None
) -> torch.Tensor:
    return linear(x, weight, bias, weight_scale=weight_scale)


@_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


@torch.library.custom_op("specvlm_kernels::linear_parts", mutates_args=())
def _linear_parts(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor | None) -> torch.Tensor:
    return linear_parts(x, weight, weight_scale=weight_scale)


@_linear_parts.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor | None) -> torch.Tensor:
    parts = 1
    if takes_kernel("x", x):
        with on_device(x):
            parts = parts_of(int(weight.shape[0]), int(weight.shape[1]), parts_config(x.dtype, weight.dtype))
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(parts, *x.shape[:2], weight.shape[0], dtype=dtype)


@torch.library.custom_op("specvlm_kernels::gated_linear", mutates_args=())
def _gated_linear(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor | None) -> torch.Tensor:
    return gated_linear(x, weight, weight_scale=weight_scale)


@_gated_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0] // 2)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer for few rows, whose bits for a row do not depend on the others.

    Args:
        x: [B, T, K]; fp32, fp16 or bf16 (on CPU fp64 too), any strides.
        weight: [N, K], dtype of x or float8_e4m3fn, with a contiguous last axis.
        bias: [N], dtype of x, or None.
        weight_scale: [N] fp32 what a row of an e4m3 weight is to be multiplied by; None for any other.

    Returns:
        [B, T, N], contiguous, dtype of x.

    Raises:
        ValueError: a wrong shape, dtype, device or stride. The kernel is forward only (the reference, on CPU, is not):
            where it serves, also a tensor that requires a gradient while gradients are enabled.
    """
    kernel = check_product(x, weight, bias, weight_scale)
    if torch.compiler.is_compiling():
        return _linear(x, weight, bias, weight_scale)
    if not kernel:
        return reference.linear(x, weight, bias, weight_scale=weight_scale)
    with on_device(x):
        config = linear_config(triton.cdiv(weight.shape[0], 2), x.dtype, weight.dtype)
        return launch_linear(x, weight, bias, config, None, weight_scale)


def linear_parts(x: torch.Tensor, weight: torch.Tensor, *, weight_scale: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer for few rows as parts whose sum it is, for `add_rms_norm` to add up.

    Args:
        x: [B, T, K]; fp32, fp16 or bf16 (on CPU fp64 too), any strides.
        weight: [N, K], dtype of x or float8_e4m3fn, with a contiguous last axis.
        weight_scale: as in `linear`.

    Returns:
        [P, B, T, N], contiguous, fp32 (fp64 of fp64); P follows from the weight's shape and dtype, and is 1 where the
        reference serves.

    Raises:
        ValueError: as in `linear`.
    """
    kernel = check_product(x, weight, None, weight_scale)
    if torch.compiler.is_compiling():
        return _linear_parts(x, weight, weight_scale)
    if not kernel:
        return reference.linear_parts(x, weight, weight_scale=weight_scale)
    with on_device(x):
        config = parts_config(x.dtype, weight.dtype)
        return launch_linear(x, weight, None, config, parts_of(weight.shape[0], weight.shape[1], config), weight_scale)


def gated_linear(x: torch.Tensor, weight: torch.Tensor, *, weight_scale: torch.Tensor | None = None) -> torch.Tensor:
    """The first half of a gated feed-forward layer for few rows: silu(x W_gate^T) * (x W_up^T).

    Args:
        x: [B, T, K]; fp32, fp16 or bf16 (on CPU fp64 too), any strides.
        weight: [2 * I, K], the gate's rows first, dtype of x or float8_e4m3fn, with a contiguous last axis.
        weight_scale: as in `linear`, [2 * I].

    Returns:
        [B, T, I], contiguous, dtype of x.

    Raises:
        ValueError: an odd number of rows in weight; else as in `linear`.
    """
    kernel = check_product(x, weight, None, weight_scale)
    if weight.shape[0] % 2:
        raise ValueError(f"weight: expected an even number of rows, got {weight.shape[0]}")
    if torch.compiler.is_compiling():
        return _gated_linear(x, weight, weight_scale)
    if not kernel:
        return reference.gated_linear(x, weight, weight_scale=weight_scale)
    with on_device(x):
        config = linear_config(weight.shape[0] // 2, x.dtype, weight.dtype)
        return launch_gated_linear(x, weight, config, weight_scale)
