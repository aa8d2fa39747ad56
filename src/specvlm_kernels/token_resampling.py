"""Fewer visual tokens by attention: a few learned queries read all of them, without a key or a value being written.

With x [T, C] the tokens, q [Q, heads, D] the queries, and W_k, W_v [heads, D, C] the projections, row (i, h) is

    softmax over t of (scale * q_ih . (W_k_h x_t)),  then the weighted mean of W_v_h x_t

Keys and values would be T rows of heads * D each, twice. But a product of three can start at either end: the query goes
through the key's projection once, and the value's projection takes the mean, instead of the mean taking projections.

    a_ih = W_k_h^T q_ih             [C]     the folded query
    p_ih = softmax(scale * x a_ih)  [T]     the weights
    m_ih = x^T p_ih                 [C]     the mean token
    o_ih = W_v_h m_ih               [D]

For the R = Q * heads rows that is 4 T R C operations in the middle in place of the 4 T heads D C of keys and values:
D / Q times fewer, 64 times for two queries and heads of 128. Written in between are R rows of C twice, R of T, and R
of T in fp32 for each part of the scores (below): 5 MB for two queries, 2,880 tokens and C = heads * D = 4,096 in bf16,
where keys and values would be 47 MB. The floor in bytes is x, both weights and the queries, read once; x is read a
second time for the mean, from the L2 cache where it fits.

The gradient has the same form. With do that of o, and n_ih = W_v_h^T do_ih folded as a query is,

    dW_v_h = sum over i of do_ih m_ih^T          dp_ih = x n_ih
    ds_ih = scale * p_ih * (dp_ih - p_ih . dp_ih)
    da_ih = x^T ds_ih                            dx = sum over i, h of p_ih n_ih^T + ds_ih a_ih^T
    dq_ih = W_k_h da_ih                          dW_k_h = sum over i of q_ih da_ih^T

and the gradients of queries and weights are summed over the batch. So everything but the softmax and its gradient is a
strided, batched product: `_matmul_kernel`. Scores are summed over channels in parts, so that a few hundred tokens fill
a GPU too; the softmax's program of a row adds them in a fixed order. Backward keeps a, p and m, in the dtype of x.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ._checks import check_finite, check_tensor
from ._dispatch import kernel_operator
from .reference import token_pooling as reference
from .token_pooling import check_tokens
from .tree_attention import LOG2_E

#: Programs that score tokens, about, and the most parts that the sum over channels is split into.
SCORE_PROGRAMS, MOST_PARTS = 256, 16

#: Values of all parts of a row that a softmax has in flight.
SOFTMAX_TILE = 4096


@triton.jit
def _matmul_kernel(
    a, b, out, rows, columns, depth, split, parts,
    stride_az, stride_am, stride_ak, stride_bz, stride_bk, stride_bn, stride_op, stride_oz, stride_om, stride_on,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_part, i_z = tl.program_id(0) % parts, tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) // parts * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = (o_m < rows)[:, None], (o_n < columns)[None, :]
    o_m, o_n = o_m.to(tl.int64)[:, None], o_n.to(tl.int64)[None, :]
    p_a, p_b = a + i_z * stride_az + o_m * stride_am, b + i_z * stride_bz + o_n * stride_bn

    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = tl.minimum(i_part * split + split, depth)
    for first in range(i_part * split, last, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        m_k = o_k < last
        o_k = o_k.to(tl.int64)
        b_a = tl.load(p_a + o_k[None, :] * stride_ak, mask=m_m & m_k[None, :], other=0.0)
        b_b = tl.load(p_b + o_k[:, None] * stride_bk, mask=m_k[:, None] & m_n, other=0.0)
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision="ieee")
    p_out = out + i_part.to(tl.int64) * stride_op + i_z * stride_oz + o_m * stride_om + o_n * stride_on
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_m & m_n)


@triton.jit
def _load_parts(p_part, first, tokens, parts, stride_p, PARTS: tl.constexpr, BLOCK_T: tl.constexpr):
    """[BLOCK_T] of a row from token `first` on: the sum of its parts, in fp32."""
    o_p, o_t = tl.arange(0, PARTS), first + tl.arange(0, BLOCK_T)
    m_part = (o_p < parts)[:, None] & (o_t < tokens)[None, :]
    return tl.sum(tl.load(p_part + o_p.to(tl.int64)[:, None] * stride_p + o_t[None, :], mask=m_part, other=0.0), 0)


@triton.jit(do_not_specialize=["parts"])
def _softmax_kernel(part, weights, scale_log2, tokens, parts, stride_p, PARTS: tl.constexpr, BLOCK_T: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    p_part = part + i_row * tokens
    largest, total = -float("inf"), 0.0
    for first in range(0, tokens, BLOCK_T):
        m_t = first + tl.arange(0, BLOCK_T) < tokens
        b_score = _load_parts(p_part, first, tokens, parts, stride_p, PARTS, BLOCK_T) * scale_log2
        b_score = tl.where(m_t, b_score, -float("inf"))
        new = tl.maximum(largest, tl.max(b_score, 0))
        total = total * tl.exp2(largest - new) + tl.sum(tl.exp2(b_score - new), 0)
        largest = new
    for first in range(0, tokens, BLOCK_T):
        o_t = first + tl.arange(0, BLOCK_T)
        b_score = _load_parts(p_part, first, tokens, parts, stride_p, PARTS, BLOCK_T) * scale_log2
        b_weight = tl.exp2(b_score - largest) / total
        tl.store(weights + i_row * tokens + o_t, b_weight.to(weights.dtype.element_ty), mask=o_t < tokens)


@triton.jit(do_not_specialize=["parts"])
def _softmax_backward_kernel(
    part, weights, out, scale, tokens, parts, stride_p, PARTS: tl.constexpr, BLOCK_T: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    p_part, p_weight = part + i_row * tokens, weights + i_row * tokens
    mean = 0.0
    for first in range(0, tokens, BLOCK_T):
        o_t = first + tl.arange(0, BLOCK_T)
        b_weight = tl.load(p_weight + o_t, mask=o_t < tokens, other=0.0).to(tl.float32)
        mean += tl.sum(b_weight * _load_parts(p_part, first, tokens, parts, stride_p, PARTS, BLOCK_T), 0)
    for first in range(0, tokens, BLOCK_T):
        o_t = first + tl.arange(0, BLOCK_T)
        b_weight = tl.load(p_weight + o_t, mask=o_t < tokens, other=0.0).to(tl.float32)
        b_grad = b_weight * (_load_parts(p_part, first, tokens, parts, stride_p, PARTS, BLOCK_T) - mean) * scale
        tl.store(out + i_row * tokens + o_t, b_grad.to(out.dtype.element_ty), mask=o_t < tokens)


def launch_matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, block_n: int, block_k: int) -> torch.Tensor:
    """out[p, z] = a[z] @ b[z] over part p of the depth; all three have any strides, and the sums are in fp32.

    Args:
        a, b: [Z, M, K] and [Z, K, N] of one dtype.
        out: [parts, Z, M, N], or [Z, M, N] for one part.
        block_n, block_k: columns and depth a tile, in 2-byte types; with full fp32 sums run in smaller ones.

    Returns:
        out.
    """
    batch, rows, depth = a.shape
    columns, parts = b.shape[2], out.shape[0] if out.dim() == 4 else 1
    block_m = min(128, max(16, triton.next_power_of_2(rows)))
    if a.dtype == torch.float32:  # no tensor cores: products run from registers, and larger tiles spill
        block_m, block_n, block_k = 16, min(block_n, 32), min(block_k, 32)
    split = triton.cdiv(triton.cdiv(depth, parts), block_k) * block_k
    _matmul_kernel[(triton.cdiv(columns, block_n) * parts, triton.cdiv(rows, block_m), batch)](
        a, b, out, rows, columns, depth, split, parts,
        *a.stride(), *b.stride(), *((0,) if out.dim() == 3 else ()), *out.stride(),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def _by_head(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads * D, C] -> [heads, D, C]."""
    return weight.view(heads, weight.shape[0] // heads, weight.shape[1])


def launch_fold(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows [N, heads, D] through the transposed projection [heads * D, C] of their head: [N, heads, C]."""
    count, heads, _ = rows.shape
    out = torch.empty((count, heads, weight.shape[1]), dtype=rows.dtype, device=rows.device)
    launch_matmul(rows.transpose(0, 1), _by_head(weight, heads), out.transpose(0, 1), 128, 64)
    return out


def launch_project(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows [N, heads, C] through the projection [heads * D, C] of their head: [N, heads, D]."""
    count, heads, _ = rows.shape
    out = torch.empty((count, heads, weight.shape[0] // heads), dtype=rows.dtype, device=rows.device)
    launch_matmul(rows.transpose(0, 1), _by_head(weight, heads).transpose(1, 2), out.transpose(0, 1), 16, 128)
    return out


def launch_outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The gradient of a projection: the sum over N of left [N, heads, D] times right [N, heads, C]: [heads * D, C]."""
    _, heads, dim = left.shape
    out = torch.empty((heads * dim, right.shape[2]), dtype=left.dtype, device=left.device)
    launch_matmul(left.permute(1, 2, 0), right.transpose(0, 1), _by_head(out, heads), 64, 16)
    return out


def launch_scores(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Rows [B, R, C] times tokens [B, T, C], in parts over the channels: [parts, B, R, T] fp32."""
    batch, count, channels = rows.shape
    block_t, block_c = 64, 64
    blocks = max(1, batch * triton.cdiv(count, 128) * triton.cdiv(x.shape[1], block_t))
    parts = max(1, min(MOST_PARTS, SCORE_PROGRAMS // blocks, channels // block_c))
    part = torch.empty((parts, batch, count, x.shape[1]), dtype=torch.float32, device=x.device)
    return launch_matmul(rows, x.transpose(1, 2), part, block_t, block_c)


def launch_mean(weights: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights [B, R, T] times tokens [B, T, C]: [B, R, C] in `dtype`."""
    out = torch.empty((*weights.shape[:2], x.shape[2]), dtype=dtype, device=x.device)
    return launch_matmul(weights, x, out, 32, 64)


def _softmax_tile(parts: int, tokens: int) -> dict[str, int]:
    """Parts, and tokens of a row, that a softmax has in flight."""
    padded = triton.next_power_of_2(parts)
    return {"PARTS": padded, "BLOCK_T": min(SOFTMAX_TILE // padded, triton.next_power_of_2(tokens))}


def launch_resample_tokens(
    x: torch.Tensor, queries: torch.Tensor, key_weight: torch.Tensor, value_weight: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the kernels; arguments as in `resample_tokens`, already checked.

    Returns:
        out [B, Q, heads * D], and what its gradient needs: folded queries [Q, heads, C], weights [B, Q * heads, T] and
        mean tokens [B, Q * heads, C].
    """
    batch, tokens, channels = x.shape
    count, heads, dim = queries.shape
    folded = launch_fold(queries.contiguous(), key_weight.contiguous())
    part = launch_scores(folded.view(1, count * heads, channels).expand(batch, -1, -1), x)
    weights = torch.empty((batch, count * heads, tokens), dtype=x.dtype, device=x.device)
    _softmax_kernel[(batch * count * heads,)](
        part, weights, scale * LOG2_E, tokens, part.shape[0], part.stride(0),
        **_softmax_tile(part.shape[0], tokens), num_warps=4,
    )  # fmt: skip
    mean = launch_mean(weights, x, x.dtype)
    out = launch_project(mean.view(batch * count, heads, channels), value_weight.contiguous())
    return out.view(batch, count, heads * dim), folded, weights, mean


def launch_resample_tokens_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    queries: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    folded: torch.Tensor,
    weights: torch.Tensor,
    mean: torch.Tensor,
    scale: float,
    wants_x: bool,
) -> list[torch.Tensor]:
    """The gradients of queries, key_weight and value_weight, and where it is wanted of x, from that of the result."""
    batch, tokens, channels = x.shape
    count, heads, dim = queries.shape
    rows = grad.contiguous().view(batch * count, heads, dim)
    wanted = launch_fold(rows, value_weight.contiguous()).view(batch, count * heads, channels)
    part = launch_scores(wanted, x)
    slopes = torch.empty((batch, count * heads, tokens), dtype=x.dtype, device=x.device)
    _softmax_backward_kernel[(batch * count * heads,)](
        part, weights, slopes, scale, tokens, part.shape[0], part.stride(0),
        **_softmax_tile(part.shape[0], tokens), num_warps=4,
    )  # fmt: skip
    grad_folded = launch_mean(slopes, x, torch.float32).sum(0).to(x.dtype).view(count, heads, channels)
    gradients = [
        launch_project(grad_folded, key_weight.contiguous()),
        launch_outer(queries.contiguous(), grad_folded),
        launch_outer(rows, mean.view(batch * count, heads, channels)),
    ]
    if wants_x:
        shares = torch.cat([weights, slopes], 1)
        sources = torch.cat([wanted, folded.view(1, count * heads, channels).expand(batch, -1, -1)], 1)
        grad_x = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
        gradients.append(launch_matmul(shares.transpose(1, 2), sources, grad_x, 64, 16))
    return gradients


_resample = kernel_operator("resample_tokens", launch_resample_tokens)
_resample_backward = kernel_operator("resample_tokens_backward", launch_resample_tokens_backward)


@_resample.register_fake
def _(
    x: torch.Tensor, queries: torch.Tensor, key_weight: torch.Tensor, value_weight: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, channels = x.shape
    count, heads, dim = queries.shape
    return (
        x.new_empty(batch, count, heads * dim),
        x.new_empty(count, heads, channels),
        x.new_empty(batch, count * heads, tokens),
        x.new_empty(batch, count * heads, channels),
    )


@_resample_backward.register_fake
def _(
    grad: torch.Tensor,
    x: torch.Tensor,
    queries: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    folded: torch.Tensor,
    weights: torch.Tensor,
    mean: torch.Tensor,
    scale: float,
    wants_x: bool,
) -> list[torch.Tensor]:
    like = [queries, key_weight, value_weight, x] if wants_x else [queries, key_weight, value_weight]
    return [tensor.new_empty(tensor.shape) for tensor in like]


def _resample_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _resample_gradient(ctx: Any, grad: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
    wants_x = ctx.needs_input_grad[0]
    gradients = _resample_backward(grad, *ctx.saved_tensors, ctx.scale, wants_x)
    return gradients[3] if wants_x else None, *gradients[:3], None


_resample.register_autograd(_resample_gradient, setup_context=_resample_context)


def resample_tokens(
    x: torch.Tensor,
    queries: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """A few learned queries attend to all tokens, head by head; differentiable in all tensors.

    Row (i, h) is the softmax over tokens t of scale * queries[i, h] . (key_weight_h x_t), times value_weight_h x_t.

    Args:
        x: [B, T, C] tokens; fp32, fp16 or bf16 (on CPU fp64 too), any strides.
        queries: [Q, heads, D], dtype of x.
        key_weight, value_weight: [heads * D, C], dtype of x: rows h * D to (h + 1) * D are head h.
        scale: of the scores, a finite number; None: D ** -0.5.

    Returns:
        [B, Q, heads * D], contiguous, dtype of x; an output projection is the caller's. In 2-byte types the folded
        queries, the weights and the mean tokens are rounded as keys, weights and values would be.

    Raises:
        ValueError: a wrong shape, dtype, device or scale.

    The resampler of Flamingo (Alayrac et al., 2022) and of BLIP-2 (Li et al., 2023), one layer of it.
    """
    kernel = check_tokens(x)
    check_tensor("queries", queries, ("Q", "heads", "D"), x.dtype, x.device)
    count, heads, dim = queries.shape
    if count == 0 or heads == 0 or dim == 0:
        raise ValueError(f"queries: expected at least one query, head and value, got shape {list(queries.shape)}")
    check_tensor("key_weight", key_weight, (heads * dim, x.shape[2]), x.dtype, x.device)
    check_tensor("value_weight", value_weight, (heads * dim, x.shape[2]), x.dtype, x.device)
    if scale is None:
        scale = dim**-0.5
    check_finite("scale", scale)
    if not kernel:
        return reference.resample_tokens(x, queries, key_weight, value_weight, scale=scale)
    return _resample(x, queries, key_weight, value_weight, float(scale))[0]
