"""What a layer of a Llama-like decoder needs between its matrix products, one launch each.

    add_rms_norm   total = residual + x,   normed = weight * total / sqrt(mean(total^2) + eps)
    gated_silu     silu(gate) * up = gate * up / (1 + exp(-gate))

Both read what a product wrote and write what the next reads, so what they cost is a launch and that traffic once. Plain
torch makes several launches of each, and writes what lies between.

Sums are fp32 and rounded once; `total` is rounded before it is normed, since that is what the next layer adds to.

A program norms one row of whatever batch, held in registers, by one binary: a row's bits do not depend on its company.

Inside `torch.compile` each is one operator, which gives no gradient.
"""

import torch
import triton
import triton.language as tl

from ._checks import FLOATS, KERNEL_FLOATS, check_finite, check_forward_only, check_tensor
from ._dispatch import on_device, takes_kernel
from .reference import decoder_ops as reference

#: The widest row that a program norms.
MOST_WIDTH = 16384

#: Columns that a program gates.
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


def launch_gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """Runs the kernel; the argument as in `gated_silu`, already checked."""
    batch, rows, width = gate_up.shape
    out = torch.empty((batch, rows, width // 2), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        _gated_silu_kernel[(batch * rows, triton.cdiv(width // 2, GATED_COLUMNS))](
            gate_up.contiguous(), out, width // 2, BLOCK_I=GATED_COLUMNS, num_warps=4
        )
    return out


@torch.library.custom_op("specvlm_kernels::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, total = add_rms_norm(x, residual, weight, eps=eps)
    # It may be x, or lie in it, which no operator returns.
    aliases = residual is None and total.data_ptr() == x.data_ptr()
    return normed, total.clone(memory_format=torch.contiguous_format) if aliases else total


@_add_rms_norm.register_fake
def _(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    normed = weight.new_empty(x.shape[-3:])
    return normed, torch.empty_like(normed)


@torch.library.custom_op("specvlm_kernels::gated_silu", mutates_args=())
def _gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    return gated_silu(gate_up)


@_gated_silu.register_fake
def _(gate_up: torch.Tensor) -> torch.Tensor:
    batch, rows, width = gate_up.shape
    return gate_up.new_empty(batch, rows, width // 2)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds to the residual stream and norms the sum by its root mean square.

    Args:
        x: [B, T, H] in the dtype of weight, or parts [P, B, T, H] whose sum it is, in fp32 (on CPU, where weight is
            fp64, in fp64); any strides.
        residual: [B, T, H], dtype of weight, any strides; None: nothing is added.
        weight: [H]; fp32, fp16 or bf16 (on CPU fp64 too). The kernel takes H up to 16,384.
        eps: is added to the mean square, at least 0.

    Returns:
        normed [B, T, H] and total [B, T, H], dtype of weight, contiguous. Where there is nothing to add, total is x
        itself, or may lie in it; inside `torch.compile` it is a copy.

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
    if kernel:
        check_tensor("weight", weight, weight.shape, KERNEL_FLOATS)
        if width > MOST_WIDTH:
            raise ValueError(f"weight: expected at most {MOST_WIDTH} columns, got {width}")
        check_forward_only(x=x, weight=weight, **({} if residual is None else {"residual": residual}))
    if torch.compiler.is_compiling():
        return _add_rms_norm(x, residual, weight, eps)
    if not kernel:
        return reference.add_rms_norm(x, residual, weight, eps=eps)
    with on_device(x):
        return launch_add_rms_norm(x, residual, weight, eps)


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
    kernel = takes_kernel("gate_up", gate_up)
    if kernel:
        check_tensor("gate_up", gate_up, gate_up.shape, KERNEL_FLOATS)
        check_forward_only(gate_up=gate_up)
    if torch.compiler.is_compiling():
        return _gated_silu(gate_up)
    if not kernel:
        return reference.gated_silu(gate_up)
    with on_device(gate_up):
        return launch_gated_silu(gate_up)
