"""How far a draft's distributions are from their teacher's, without a probability being written; forward and backward.

With z the draft's logits and t the teacher's, a row each, q = softmax(z), p = softmax(t):

    soft cross-entropy   -sum_v p_v log q_v        d/dz_v = q_v - p_v
    total variation       sum_v |q_v - p_v|        d/dz_v = q_v (s_v - sum_u q_u s_u),   s = sign(q - p)

One program a row keeps the log-sum-exps of z and t online. Every lane has a maximum and a sum of its own, merged when
the row has been read, so nothing waits in the loop. The cross-entropy needs one reading: with m the largest logit so
far it is log sum_v exp(z_v - m) + sum_v p_v (m - z_v), where no term is negative and a new m shifts the second sum by
what the weights come to. The total variation needs the log-sum-exps first, and reads the row again.

What is kept for backward is four numbers a row: each side's largest logit and the logarithm of the sum under it, apart,
so that an offset common to a row's logits costs no digits. For the total variation sum_u q_u s_u is a fifth. Backward
computes q and p again, tile by tile, and writes the gradient of the draft's logits alone.

Memory, at R rows of V tokens. Plain torch holds two [R, V] tensors in fp32 from forward to backward (log q and p, or q
and q - p), 8 R V bytes, and has three of them, 12 R V, at forward's peak. Here it is 16 R bytes, or 20 R. For 2048 rows
of 32064 tokens that is 525 MB held and 788 MB at the peak against 33 KB, or 41 KB; of 152064 tokens, 2.5 GB and 3.7 GB
against the same.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._checks import FLOATS, KERNEL_FLOATS, check_tensor
from ._dispatch import on_device, takes_kernel
from .reference import distillation as reference

#: Tokens of a row that a program holds at a time.
TILE = 2048

#: Where a maximum starts: unlike -inf it can be subtracted from -inf.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _logit_tile(p_row, o_token, vocabulary, stride_v):
    """Logits in fp32; -inf past the vocabulary."""
    p_logits = p_row + o_token.to(tl.int64) * stride_v
    return tl.load(p_logits, mask=o_token < vocabulary, other=-float("inf")).to(tl.float32)


@triton.jit
def _add(b_x, b_max, b_sum):
    """Adds exp(b_x) to the sums b_sum exp(b_max), a lane each.

    Returns the new maxima and sums, and what the old sums and the new terms were multiplied by.
    """
    b_e = tl.exp(-tl.abs(b_x - b_max))
    m_new = b_x > b_max
    b_shrink, b_term = tl.where(m_new, b_e, 1.0), tl.where(m_new, 1.0, b_e)
    return tl.maximum(b_max, b_x), b_sum * b_shrink + b_term, b_shrink, b_term


@triton.jit
def _merged(b_max, b_sum):
    """Of all lanes together: the maximum, the sum under it, and what each lane was multiplied by."""
    largest = tl.max(b_max, 0)
    b_weight = tl.exp(b_max - largest)
    return largest, tl.sum(b_sum * b_weight, 0), b_weight


@triton.jit
def _softmax(b_x, largest, log_sum):
    """Probabilities, given the largest logit of the row and the logarithm of the sum under it."""
    return tl.exp(b_x - largest - log_sum)


@triton.jit
def _sign(b_x):
    """-1, 0 or 1."""
    return (b_x > 0.0).to(tl.float32) - (b_x < 0.0).to(tl.float32)


@triton.jit
def _weighted(b_weight, b_x):
    """b_weight * b_x, 0 where the weight is, whatever b_x."""
    return b_weight * tl.where(b_weight == 0.0, 0.0, b_x)


@triton.jit
def _soft_cross_entropy_kernel(
    logits, teacher_logits, loss, kept, vocabulary, stride_r, stride_v, stride_tr, stride_tv, TILE: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    p_row, p_teacher = logits + i_row * stride_r, teacher_logits + i_row * stride_tr

    b_max, b_max_t = tl.full([TILE], LOWEST, tl.float32), tl.full([TILE], LOWEST, tl.float32)
    b_sum, b_sum_t = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    b_cost = tl.zeros([TILE], tl.float32)  # sum of exp(t - b_max_t) (b_max - z)
    for i_first in range(0, vocabulary, TILE):
        o_token = i_first + tl.arange(0, TILE)
        b_z = _logit_tile(p_row, o_token, vocabulary, stride_v)
        b_t = _logit_tile(p_teacher, o_token, vocabulary, stride_tv)
        b_cost += _weighted(b_sum_t, tl.maximum(b_z - b_max, 0.0))
        b_max, b_sum, _, _ = _add(b_z, b_max, b_sum)
        b_max_t, b_sum_t, b_shrink, b_term = _add(b_t, b_max_t, b_sum_t)
        b_cost = _weighted(b_shrink, b_cost) + _weighted(b_term, b_max - b_z)

    largest, total, _ = _merged(b_max, b_sum)
    largest_t, total_t, b_weight_t = _merged(b_max_t, b_sum_t)
    b_cost += _weighted(b_sum_t, largest - b_max)
    tl.store(loss + i_row, tl.log(total) + tl.sum(_weighted(b_weight_t, b_cost), 0) / total_t)
    tl.store(kept + i_row * 4, largest)
    tl.store(kept + i_row * 4 + 1, tl.log(total))
    tl.store(kept + i_row * 4 + 2, largest_t)
    tl.store(kept + i_row * 4 + 3, tl.log(total_t))


@triton.jit
def _total_variation_kernel(
    logits, teacher_logits, loss, kept, vocabulary, stride_r, stride_v, stride_tr, stride_tv, TILE: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    p_row, p_teacher = logits + i_row * stride_r, teacher_logits + i_row * stride_tr

    b_max, b_max_t = tl.full([TILE], LOWEST, tl.float32), tl.full([TILE], LOWEST, tl.float32)
    b_sum, b_sum_t = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for i_first in range(0, vocabulary, TILE):
        o_token = i_first + tl.arange(0, TILE)
        b_max, b_sum, _, _ = _add(_logit_tile(p_row, o_token, vocabulary, stride_v), b_max, b_sum)
        b_max_t, b_sum_t, _, _ = _add(_logit_tile(p_teacher, o_token, vocabulary, stride_tv), b_max_t, b_sum_t)
    largest, total, _ = _merged(b_max, b_sum)
    largest_t, total_t, _ = _merged(b_max_t, b_sum_t)
    log_sum, log_sum_t = tl.log(total), tl.log(total_t)

    b_loss, b_balance = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for i_first in range(0, vocabulary, TILE):
        o_token = i_first + tl.arange(0, TILE)
        b_q = _softmax(_logit_tile(p_row, o_token, vocabulary, stride_v), largest, log_sum)
        b_p = _softmax(_logit_tile(p_teacher, o_token, vocabulary, stride_tv), largest_t, log_sum_t)
        b_loss += tl.abs(b_q - b_p)
        b_balance += _sign(b_q - b_p) * b_q
    tl.store(loss + i_row, tl.sum(b_loss, 0))
    tl.store(kept + i_row * 5, largest)
    tl.store(kept + i_row * 5 + 1, log_sum)
    tl.store(kept + i_row * 5 + 2, largest_t)
    tl.store(kept + i_row * 5 + 3, log_sum_t)
    tl.store(kept + i_row * 5 + 4, tl.sum(b_balance, 0))


@triton.jit
def _soft_cross_entropy_grad_kernel(
    grad, logits, teacher_logits, kept, out, vocabulary, stride_r, stride_v, stride_tr, stride_tv, TILE: tl.constexpr
):
    i_row, o_token = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    b_z = _logit_tile(logits + i_row * stride_r, o_token, vocabulary, stride_v)
    b_t = _logit_tile(teacher_logits + i_row * stride_tr, o_token, vocabulary, stride_tv)
    b_q = _softmax(b_z, tl.load(kept + i_row * 4), tl.load(kept + i_row * 4 + 1))
    b_p = _softmax(b_t, tl.load(kept + i_row * 4 + 2), tl.load(kept + i_row * 4 + 3))
    b_out = tl.load(grad + i_row) * (b_q - b_p)
    tl.store(out + i_row * vocabulary + o_token, b_out.to(out.dtype.element_ty), mask=o_token < vocabulary)


@triton.jit
def _total_variation_grad_kernel(
    grad, logits, teacher_logits, kept, out, vocabulary, stride_r, stride_v, stride_tr, stride_tv, TILE: tl.constexpr
):
    i_row, o_token = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    b_z = _logit_tile(logits + i_row * stride_r, o_token, vocabulary, stride_v)
    b_t = _logit_tile(teacher_logits + i_row * stride_tr, o_token, vocabulary, stride_tv)
    b_q = _softmax(b_z, tl.load(kept + i_row * 5), tl.load(kept + i_row * 5 + 1))
    b_p = _softmax(b_t, tl.load(kept + i_row * 5 + 2), tl.load(kept + i_row * 5 + 3))
    b_out = tl.load(grad + i_row) * b_q * (_sign(b_q - b_p) - tl.load(kept + i_row * 5 + 4))
    tl.store(out + i_row * vocabulary + o_token, b_out.to(out.dtype.element_ty), mask=o_token < vocabulary)


@dataclass(frozen=True, slots=True)
class LossKernels:
    """A loss's kernels.

    Attributes:
        forward: writes the loss of each row, and what it keeps for backward.
        backward: writes the gradient of the draft's logits.
        kept: how many numbers a row forward keeps.
    """

    forward: triton.JITFunction
    backward: triton.JITFunction
    kept: int


SOFT_CROSS_ENTROPY = LossKernels(_soft_cross_entropy_kernel, _soft_cross_entropy_grad_kernel, 4)
TOTAL_VARIATION = LossKernels(_total_variation_kernel, _total_variation_grad_kernel, 5)


def launch_loss(
    kernels: LossKernels, logits: torch.Tensor, teacher_logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the forward kernel: the loss [R], and what is kept [R, kernels.kept], both fp32."""
    rows, vocabulary = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    kept = torch.empty((rows, kernels.kept), dtype=torch.float32, device=logits.device)
    tile = _tile(vocabulary)
    kernels.forward[(rows,)](
        logits, teacher_logits, loss, kept, vocabulary, *logits.stride(), *teacher_logits.stride(),
        TILE=tile, num_warps=_warps(tile),
    )  # fmt: skip
    return loss, kept


def launch_grad(
    kernels: LossKernels, grad: torch.Tensor, logits: torch.Tensor, teacher_logits: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Runs the backward kernel on the loss's gradient [R]: the gradient of the logits [R, V], in their dtype."""
    rows, vocabulary = logits.shape
    out = torch.empty((rows, vocabulary), dtype=logits.dtype, device=logits.device)
    tile = _tile(vocabulary)
    kernels.backward[(rows, triton.cdiv(vocabulary, tile))](
        grad.contiguous(), logits, teacher_logits, kept, out, vocabulary, *logits.stride(), *teacher_logits.stride(),
        TILE=tile, num_warps=_warps(tile),
    )  # fmt: skip
    return out


def _tile(vocabulary: int) -> int:
    return min(TILE, max(16, triton.next_power_of_2(vocabulary)))


def _warps(tile: int) -> int:
    return max(1, min(8, tile // 256))


def _operator(name: str, kernels: LossKernels) -> Any:
    """Makes a loss an operator of torch's, opaque to its compiler: (logits, teacher_logits) -> (loss, kept)."""

    @torch.library.custom_op(f"specvlm_kernels::{name}", mutates_args=())
    def loss(logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with on_device(logits):
            return launch_loss(kernels, logits, teacher_logits)

    @torch.library.custom_op(f"specvlm_kernels::{name}_grad", mutates_args=())
    def loss_grad(
        grad: torch.Tensor, logits: torch.Tensor, teacher_logits: torch.Tensor, kept: torch.Tensor
    ) -> torch.Tensor:
        with on_device(logits):
            return launch_grad(kernels, grad, logits, teacher_logits, kept)

    @loss.register_fake
    def _(logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = logits.shape[0]
        return logits.new_empty(rows, dtype=torch.float32), logits.new_empty((rows, kernels.kept), dtype=torch.float32)

    @loss_grad.register_fake
    def _(grad: torch.Tensor, logits: torch.Tensor, teacher_logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return logits.new_empty(logits.shape)

    def keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, output[1])

    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        return loss_grad(grad, *ctx.saved_tensors), None

    loss.register_autograd(backward, setup_context=keep)
    return loss


_soft_cross_entropy = _operator("soft_cross_entropy", SOFT_CROSS_ENTROPY)
_total_variation = _operator("total_variation", TOTAL_VARIATION)


def check_loss(logits: torch.Tensor, teacher_logits: torch.Tensor) -> bool:
    """Checks what the losses take; True where a kernel serves."""
    check_tensor("logits", logits, ("R", "V"), FLOATS)
    kernel = takes_kernel("logits", logits)
    floats = KERNEL_FLOATS if kernel else FLOATS
    check_tensor("logits", logits, ("R", "V"), floats)
    check_tensor("teacher_logits", teacher_logits, tuple(logits.shape), floats, logits.device)
    if logits.shape[1] == 0:
        raise ValueError(f"logits: expected at least one token, got shape {list(logits.shape)}")
    return kernel


def soft_cross_entropy(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of a draft's distribution under its teacher's, -sum_v softmax(teacher)_v log softmax(draft)_v.

    Differentiable once, in `logits` alone: the gradient of a row is softmax(draft) - softmax(teacher). Runs inside
    `torch.compile(fullgraph=True)`.

    Args:
        logits: [R, V] the draft's, fp32, fp16 or bf16 (on CPU fp64 too), any strides.
        teacher_logits: [R, V], of any of these dtypes and strides; it is detached.

    Either may hold -inf, as a reduced vocabulary does. A token of teacher's probability 0 costs nothing, whatever the
    draft says of it; one above 0 that the draft holds at -inf costs +inf. (A finite logit some 90 nats below the
    teacher's largest has a probability that fp32 may round to 0, or not.)

    Returns:
        [R] fp32, in nats (fp64 where either is fp64). A row that has no distribution on either side, being all -inf or
        holding a NaN or +inf, is NaN, and its gradient too.

    Raises:
        ValueError: a wrong shape, dtype or device.

    Example:
        >>> soft_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, -math.inf]])).tolist()
        [0.6931471824645996]
    """
    if not check_loss(logits, teacher_logits):
        return reference.soft_cross_entropy(logits, teacher_logits)
    return _soft_cross_entropy(logits, teacher_logits.detach())[0]


def total_variation(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """The L1 distance of a draft's distribution from its teacher's, sum_v |softmax(draft)_v - softmax(teacher)_v|.

    It is twice what the literature calls total variation, and half of it is how often a ratio test would refuse the
    draft. Differentiable once, in `logits` alone: with q = softmax(draft) and s = sign(q - softmax(teacher)) the
    gradient of a row is q_v (s_v - sum_u q_u s_u). Runs inside `torch.compile(fullgraph=True)`.

    Args:
        logits, teacher_logits: as in `soft_cross_entropy`; -inf is a probability of 0.

    Returns:
        [R] fp32, from 0 to 2 (fp64 where either is fp64). A row that has no distribution on either side is NaN; its
        gradient is NaN where that is the draft's fault, and 0 where it is the teacher's.

    Raises:
        ValueError: a wrong shape, dtype or device.

    Example:
        >>> total_variation(torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, -math.inf]])).tolist()
        [1.0]
    """
    if not check_loss(logits, teacher_logits):
        return reference.total_variation(logits, teacher_logits)
    return _total_variation(logits, teacher_logits.detach())[0]
