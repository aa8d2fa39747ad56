"""Fewer visual tokens by their place in the picture: the mean of every window, or a learned depthwise convolution.

Tokens are a grid, row by row: token i of H * W lies at (i // W, i % W). With stride s and window k,

    pool    out[p, q, c] = mean of x[y, x', c] over the y in [p s, p s + s) and x' in [q s, q s + s) inside the grid
    conv    out[p, q, c] = bias[c] + sum over (i, j) of weight[c, i, j] x[p s + i, q s + j, c],   i, j < k

Pooling windows tile the grid; those at its lower and right edge may be ragged, and divide by what they have. Windows of
a convolution lie inside the grid: what is left over at its edges is not read. The gradients:

    pool    dx[y, x', c] = dout[y // s, x' // s, c] / size of the window
    conv    dx[y, x', c] = sum over (a, b) of weight[c, y % s + a s, x' % s + b s] dout[y // s - a, x' // s - b, c]
            dweight[c, i, j] = sum over (p, q) of dout[p, q, c] x[p s + i, q s + j, c]
            dbias[c] = sum over (p, q) of dout[p, q, c]

A channel meets no other, so neighbouring threads take neighbouring channels. A program of pooling owns a window: x is
read once and 1 / s^2 of it written, backward the other way round. A program of a convolution owns `OUTPUTS` windows:
where windows overlap, values come from the caches, and memory is read once. In dx, tokens with the same remainders of y
and x' by s meet the same taps; a program owns tokens of one such class, so that a tap is one vector of channels for all
of them. dweight is summed by about `GRADIENT_PROGRAMS` programs and their parts then added in a fixed order.

Against `avg_pool2d` and `conv2d`, which want [B, C, H, W], the transposed copy of x there and of the result back is not
made: 2 B T C elements of memory and twice that in traffic. Backward keeps no more than its inputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ._checks import FLOATS, KERNEL_FLOATS, check_grid, check_tensor, check_whole
from ._dispatch import kernel_operator, takes_kernel
from .reference import token_pooling as reference

#: Values of a pooling window that a program has in flight, tokens times channels, and the most of each.
POOL_TILE, POOL_TOKENS, POOL_CHANNELS = 4096, 64, 1024

#: Windows of a convolution, or tokens of its gradient, and channels a program.
OUTPUTS, CONV_CHANNELS = 8, 256

#: Taps of the weight's gradient that a program sums.
TAPS = 16

#: Programs among which the sums of the weight's gradient are split.
GRADIENT_PROGRAMS = 512

#: The largest stride; one as large as the grid's longer side already leaves one token.
MOST_STRIDE = 2**31 - 1


@triton.jit
def _window(i_out, height, width, stride):
    """The first row and column of pooling window `i_out`, and its rows and columns inside the grid."""
    columns = tl.cdiv(width, stride)
    i_y, i_x = i_out // columns * stride, i_out % columns * stride
    return i_y, i_x, tl.minimum(stride, height - i_y), tl.minimum(stride, width - i_x)


@triton.jit(do_not_specialize=["outputs", "height", "width", "stride"])
def _pool_kernel(
    x, out, outputs, height, width, stride, channels, stride_b, stride_t, stride_c,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(channels, BLOCK_C)
    i_row = tl.program_id(0) // tiles
    i_b, i_out = (i_row // outputs).to(tl.int64), i_row % outputs
    i_y, i_x, rows, columns = _window(i_out, height, width, stride)
    o_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    p_x = x + i_b * stride_b + o_c.to(tl.int64)[None, :] * stride_c

    b_sum = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, rows * columns, BLOCK_T):
        o_t = first + tl.arange(0, BLOCK_T)
        i_token = (i_y + o_t // columns) * width + i_x + o_t % columns
        m_x = (o_t < rows * columns)[:, None] & m_c[None, :]
        b_x = tl.load(p_x + i_token.to(tl.int64)[:, None] * stride_t, mask=m_x, other=0.0)
        b_sum += tl.sum(b_x.to(tl.float32), 0)
    b_mean = b_sum / (rows * columns).to(tl.float32)
    tl.store(out + i_row.to(tl.int64) * channels + o_c, b_mean.to(out.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["outputs", "height", "width", "stride"])
def _pool_backward_kernel(
    grad, out, outputs, height, width, stride, channels, stride_b, stride_t, stride_c,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(channels, BLOCK_C)
    i_row = tl.program_id(0) // tiles
    i_b, i_out = (i_row // outputs).to(tl.int64), i_row % outputs
    i_y, i_x, rows, columns = _window(i_out, height, width, stride)
    o_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels

    p_grad = grad + i_b * stride_b + i_out.to(tl.int64) * stride_t + o_c.to(tl.int64) * stride_c
    b_share = tl.load(p_grad, mask=m_c, other=0.0).to(tl.float32) / (rows * columns).to(tl.float32)
    b_share = tl.broadcast_to(b_share.to(out.dtype.element_ty)[None, :], [BLOCK_T, BLOCK_C])
    p_out = out + i_b * height * width * channels + o_c[None, :]
    for first in range(0, rows * columns, BLOCK_T):
        o_t = first + tl.arange(0, BLOCK_T)
        i_token = (i_y + o_t // columns) * width + i_x + o_t % columns
        m_out = (o_t < rows * columns)[:, None] & m_c[None, :]
        tl.store(p_out + i_token.to(tl.int64)[:, None] * channels, b_share, mask=m_out)


@triton.jit(do_not_specialize=["outputs", "out_width", "width", "stride"])
def _conv_kernel(
    x, weight, bias, out, outputs, out_width, width, stride, channels, stride_b, stride_t, stride_c,
    K: tl.constexpr, UNROLL: tl.constexpr, BIAS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles, blocks = tl.cdiv(channels, BLOCK_C), tl.cdiv(outputs, BLOCK_O)
    i_block = tl.program_id(0) // tiles
    i_b = (i_block // blocks).to(tl.int64)
    o_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    o_out = i_block % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    m_c = o_c < channels
    m_out = (o_out < outputs)[:, None] & m_c[None, :]
    i_first = o_out // out_width * stride * width + o_out % out_width * stride
    p_x = x + i_b * stride_b + i_first.to(tl.int64)[:, None] * stride_t + o_c.to(tl.int64)[None, :] * stride_c
    p_weight = weight + o_c.to(tl.int64) * (K * K)

    b_sum = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for i_tap in tl.range(0, K * K, loop_unroll_factor=UNROLL):
        step = i_tap // K * width + i_tap % K
        b_x = tl.load(p_x + step.to(tl.int64) * stride_t, mask=m_out, other=0.0)
        b_weight = tl.load(p_weight + i_tap, mask=m_c, other=0.0)
        b_sum += b_x.to(tl.float32) * b_weight.to(tl.float32)[None, :]
    if BIAS:
        b_sum += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    p_out = out + (i_b * outputs + o_out.to(tl.int64)[:, None]) * channels + o_c[None, :]
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "stride"])
def _conv_backward_tokens_kernel(
    grad, weight, out, height, width, out_height, out_width, stride, channels, stride_b, stride_t, stride_c,
    K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # A class: the tokens in row r_y of their stride and column r_x. The first has the most, rows * columns of them.
    rows, columns = tl.cdiv(height, stride), tl.cdiv(width, stride)
    tiles, blocks = tl.cdiv(channels, BLOCK_C), tl.cdiv(rows * columns, BLOCK_O)
    classes_y, classes_x = tl.minimum(stride, height), tl.minimum(stride, width)
    i_block = tl.program_id(0) // tiles
    i_class = i_block // blocks
    i_b = (i_class // (classes_y * classes_x)).to(tl.int64)
    r_y, r_x = i_class // classes_x % classes_y, i_class % classes_x

    o_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    o_token = i_block % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    m_c = o_c < channels
    i_p, i_q = o_token // columns, o_token % columns
    i_y, i_x = i_p * stride + r_y, i_q * stride + r_x
    p_grad = grad + i_b * stride_b + o_c.to(tl.int64)[None, :] * stride_c
    p_weight = weight + o_c.to(tl.int64) * (K * K)

    b_sum = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for a in range(tl.cdiv(tl.maximum(K - r_y, 0), stride)):
        for b in range(tl.cdiv(tl.maximum(K - r_x, 0), stride)):
            i_tap = (r_y + a * stride) * K + r_x + b * stride
            m_o = (i_p >= a) & (i_p - a < out_height) & (i_q >= b) & (i_q - b < out_width)
            i_out = ((i_p - a) * out_width + i_q - b).to(tl.int64)
            b_grad = tl.load(p_grad + i_out[:, None] * stride_t, mask=m_o[:, None] & m_c[None, :], other=0.0)
            b_weight = tl.load(p_weight + i_tap, mask=m_c, other=0.0)
            b_sum += b_grad.to(tl.float32) * b_weight.to(tl.float32)[None, :]
    m_out = ((i_y < height) & (i_x < width))[:, None] & m_c[None, :]
    p_out = out + ((i_b * height + i_y[:, None]) * width + i_x[:, None]) * channels + o_c[None, :]
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["rows", "split", "outputs", "out_width", "width", "stride"])
def _conv_backward_weight_kernel(
    grad, x, part, rows, split, outputs, out_width, width, stride, channels,
    stride_b, stride_t, stride_c, stride_xb, stride_xt, stride_xc,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_part = tl.program_id(2)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_tap = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_c, m_tap = o_c < channels, o_tap < K * K
    i_step = (o_tap // K * width + o_tap % K).to(tl.int64)[:, None]
    p_grad = grad + o_c.to(tl.int64) * stride_c
    p_x = x + o_c.to(tl.int64)[None, :] * stride_xc
    b_one = (o_tap == K * K).to(tl.float32)[:, None]  # behind the taps: the bias, a tap that sees ones

    b_sum = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for i_row in range(i_part * split, tl.minimum(i_part * split + split, rows)):
        i_b, i_out = (i_row // outputs).to(tl.int64), i_row % outputs
        i_first = (i_out // out_width * stride * width + i_out % out_width * stride).to(tl.int64)
        b_grad = tl.load(p_grad + i_b * stride_b + i_out.to(tl.int64) * stride_t, mask=m_c, other=0.0)
        p_window = p_x + i_b * stride_xb + (i_first + i_step) * stride_xt
        b_x = tl.load(p_window, mask=m_tap[:, None] & m_c[None, :], other=0.0)
        b_sum += b_grad.to(tl.float32)[None, :] * (b_x.to(tl.float32) + b_one)
    p_part = part + (i_part.to(tl.int64) * (K * K + 1) + o_tap[:, None]) * channels + o_c[None, :]
    tl.store(p_part, b_sum, mask=(o_tap <= K * K)[:, None] & m_c[None, :])


def _pooled(height: int, width: int, stride: int) -> int:
    """How many windows tile a grid."""
    return -(-height // stride) * -(-width // stride)


def _windows(size: int, kernel: int, stride: int) -> int:
    """How many windows of a convolution lie inside `size`."""
    return (size - kernel) // stride + 1


def _pool_tile(stride: int, channels: int) -> dict[str, int]:
    """Tokens and channels a program has in flight."""
    tokens = min(POOL_TOKENS, triton.next_power_of_2(stride * stride))
    channels = min(POOL_CHANNELS, POOL_TILE // tokens, triton.next_power_of_2(channels))
    return {"BLOCK_T": tokens, "BLOCK_C": channels}


def _conv_tile(channels: int) -> int:
    """Channels a program of a convolution."""
    return min(CONV_CHANNELS, triton.next_power_of_2(channels))


def launch_pool_tokens(x: torch.Tensor, height: int, width: int, stride: int) -> torch.Tensor:
    """Runs the kernel; arguments as in `pool_tokens`, already checked."""
    batch, _, channels = x.shape
    stride = min(stride, max(height, width))
    outputs, tile = _pooled(height, width, stride), _pool_tile(stride, channels)
    out = torch.empty((batch, outputs, channels), dtype=x.dtype, device=x.device)
    _pool_kernel[(batch * outputs * triton.cdiv(channels, tile["BLOCK_C"]),)](
        x, out, outputs, height, width, stride, channels, *x.stride(), **tile, num_warps=4
    )
    return out


def launch_pool_tokens_backward(grad: torch.Tensor, height: int, width: int, stride: int) -> torch.Tensor:
    """The gradient of x [B, height * width, C] from that of what `launch_pool_tokens` returns."""
    batch, outputs, channels = grad.shape
    stride = min(stride, max(height, width))
    tile = _pool_tile(stride, channels)
    out = torch.empty((batch, height * width, channels), dtype=grad.dtype, device=grad.device)
    _pool_backward_kernel[(batch * outputs * triton.cdiv(channels, tile["BLOCK_C"]),)](
        grad, out, outputs, height, width, stride, channels, *grad.stride(), **tile, num_warps=4
    )
    return out


def launch_conv_tokens(
    x: torch.Tensor, height: int, width: int, weight: torch.Tensor, bias: torch.Tensor | None, stride: int
) -> torch.Tensor:
    """Runs the kernel; arguments as in `conv_tokens`, already checked."""
    batch, _, channels = x.shape
    kernel, stride = weight.shape[-1], min(stride, max(height, width))
    out_width = _windows(width, kernel, stride)
    outputs, tile = _windows(height, kernel, stride) * out_width, _conv_tile(channels)
    out = torch.empty((batch, outputs, channels), dtype=x.dtype, device=x.device)
    _conv_kernel[(batch * triton.cdiv(outputs, OUTPUTS) * triton.cdiv(channels, tile),)](
        x, weight.contiguous(), None if bias is None else bias.contiguous(), out,
        outputs, out_width, width, stride, channels, *x.stride(),
        K=kernel, UNROLL=kernel if kernel <= 8 else 1, BIAS=bias is not None, BLOCK_O=OUTPUTS, BLOCK_C=tile,
        num_warps=4,
    )  # fmt: skip
    return out


def launch_conv_tokens_backward_tokens(
    grad: torch.Tensor, height: int, width: int, weight: torch.Tensor, stride: int
) -> torch.Tensor:
    """The gradient of x [B, height * width, C] from that of what `launch_conv_tokens` returns."""
    batch, _, channels = grad.shape
    kernel, stride = weight.shape[-1], min(stride, max(height, width))
    tile = _conv_tile(channels)
    classes = min(stride, height) * min(stride, width)
    blocks = triton.cdiv(_pooled(height, width, stride), OUTPUTS)
    out = torch.empty((batch, height * width, channels), dtype=grad.dtype, device=grad.device)
    _conv_backward_tokens_kernel[(batch * classes * blocks * triton.cdiv(channels, tile),)](
        grad, weight.contiguous(), out, height, width,
        _windows(height, kernel, stride), _windows(width, kernel, stride), stride, channels, *grad.stride(),
        K=kernel, BLOCK_O=OUTPUTS, BLOCK_C=tile, num_warps=4,
    )  # fmt: skip
    return out


def launch_conv_tokens_backward_weight(
    grad: torch.Tensor, x: torch.Tensor, width: int, kernel: int, stride: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of weight [C, kernel, kernel] and bias [C] from that of what `launch_conv_tokens` returns."""
    batch, outputs, channels = grad.shape
    stride, taps = min(stride, x.shape[1]), kernel * kernel  # more than the tokens: one window in any case
    tile = _conv_tile(channels)
    tiles, tap_tiles = triton.cdiv(channels, tile), triton.cdiv(taps + 1, TAPS)
    split = max(1, triton.cdiv(batch * outputs, triton.cdiv(GRADIENT_PROGRAMS, tiles * tap_tiles)))
    parts = triton.cdiv(batch * outputs, split)
    part = torch.empty((parts, taps + 1, channels), dtype=torch.float32, device=grad.device)
    _conv_backward_weight_kernel[(tiles, tap_tiles, parts)](
        grad, x, part, batch * outputs, split, outputs, _windows(width, kernel, stride), width, stride, channels,
        *grad.stride(), *x.stride(), K=kernel, BLOCK_K=TAPS, BLOCK_C=tile, num_warps=4,
    )  # fmt: skip
    sums = part.sum(0)
    grad_weight = torch.empty((channels, kernel, kernel), dtype=grad.dtype, device=grad.device)
    grad_bias = torch.empty(channels, dtype=grad.dtype, device=grad.device)
    return grad_weight.copy_(sums[:taps].t().view_as(grad_weight)), grad_bias.copy_(sums[taps])


_pool = kernel_operator("pool_tokens", launch_pool_tokens)
_pool_backward = kernel_operator("pool_tokens_backward", launch_pool_tokens_backward)
_conv = kernel_operator("conv_tokens", launch_conv_tokens)
_conv_backward_tokens = kernel_operator("conv_tokens_backward_tokens", launch_conv_tokens_backward_tokens)
_conv_backward_weight = kernel_operator("conv_tokens_backward_weight", launch_conv_tokens_backward_weight)


@_pool.register_fake
def _(x: torch.Tensor, height: int, width: int, stride: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], _pooled(height, width, stride), x.shape[2])


@_pool_backward.register_fake
def _(grad: torch.Tensor, height: int, width: int, stride: int) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], height * width, grad.shape[2])


@_conv.register_fake
def _(
    x: torch.Tensor, height: int, width: int, weight: torch.Tensor, bias: torch.Tensor | None, stride: int
) -> torch.Tensor:
    kernel = weight.shape[-1]
    outputs = _windows(height, kernel, stride) * _windows(width, kernel, stride)
    return x.new_empty(x.shape[0], outputs, x.shape[2])


@_conv_backward_tokens.register_fake
def _(grad: torch.Tensor, height: int, width: int, weight: torch.Tensor, stride: int) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], height * width, grad.shape[2])


@_conv_backward_weight.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, width: int, kernel: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    channels = grad.shape[2]
    return grad.new_empty(channels, kernel, kernel), grad.new_empty(channels)


def _pool_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, *ctx.sizes = inputs


def _pool_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return _pool_backward(grad, *ctx.sizes), None, None, None


def _conv_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, *ctx.grid, weight, _, ctx.stride = inputs
    ctx.save_for_backward(x, weight)


def _conv_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, _, _, wants_weight, wants_bias, _ = ctx.needs_input_grad
    grad_x = grad_weight = grad_bias = None
    if wants_x:
        grad_x = _conv_backward_tokens(grad, *ctx.grid, weight, ctx.stride)
    if wants_weight or wants_bias:
        grad_weight, grad_bias = _conv_backward_weight(grad, x, ctx.grid[1], weight.shape[-1], ctx.stride)
    return grad_x, None, None, grad_weight, grad_bias if wants_bias else None, None


_pool.register_autograd(_pool_gradient, setup_context=_pool_context)
_conv.register_autograd(_conv_gradient, setup_context=_conv_context)


def check_tokens(x: torch.Tensor) -> bool:
    """Checks tokens [B, T, C]; True where a kernel serves."""
    check_tensor("x", x, ("B", "T", "C"), FLOATS)
    kernel = takes_kernel("x", x)
    if kernel:
        check_tensor("x", x, ("B", "T", "C"), KERNEL_FLOATS)
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"x: expected at least one token and one channel, got shape {list(x.shape)}")
    return kernel


def pool_tokens(x: torch.Tensor, grid: tuple[int, int], stride: int) -> torch.Tensor:
    """The mean of every stride x stride window of a grid of tokens; differentiable.

    Args:
        x: [B, H * W, C] tokens of a grid, row by row; fp32, fp16 or bf16 (on CPU fp64 too), any strides.
        grid: (H, W).
        stride: side of a window and step to the next, at least 1. Windows at the lower and right edge are what the grid
            has left of them, and their mean is over that.

    Returns:
        [B, ceil(H / stride) * ceil(W / stride), C], contiguous, dtype of x, windows row by row.

    Raises:
        ValueError: a wrong shape, dtype, device, grid or stride.

    Example:
        >>> pool_tokens(torch.arange(6.0).view(1, 6, 1), (2, 3), 2)[0, :, 0].tolist()
        [2.0, 3.5]
    """
    kernel = check_tokens(x)
    check_grid("grid", grid, x.shape[1])
    check_whole("stride", stride, 1, MOST_STRIDE)
    if not kernel:
        return reference.pool_tokens(x, grid, stride)
    return _pool(x, *grid, stride)


def conv_tokens(
    x: torch.Tensor, grid: tuple[int, int], weight: torch.Tensor, bias: torch.Tensor | None, stride: int
) -> torch.Tensor:
    """A depthwise convolution over a grid of tokens, without padding; differentiable.

    Args:
        x: [B, H * W, C] tokens of a grid, row by row; fp32, fp16 or bf16 (on CPU fp64 too), any strides.
        grid: (H, W).
        weight: [C, k, k], dtype of x; k at most H and W. Not flipped, as in `torch.nn.functional.conv2d`.
        bias: [C], dtype of x, or None.
        stride: step from window to window, at least 1.

    Returns:
        [B, ((H - k) // stride + 1) * ((W - k) // stride + 1), C], contiguous, dtype of x, windows row by row.

    Raises:
        ValueError: a wrong shape, dtype, device, grid or stride.

    Example:
        >>> x, weight = torch.arange(6.0).view(1, 6, 1), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> conv_tokens(x, (2, 3), weight, None, 1)[0, :, 0].tolist()
        [4.0, 6.0]
    """
    kernel = check_tokens(x)
    check_grid("grid", grid, x.shape[1])
    channels = x.shape[2]
    check_tensor("weight", weight, (channels, "k", "k"), x.dtype, x.device)
    if weight.shape[1] != weight.shape[2] or not 1 <= weight.shape[1] <= min(grid):
        raise ValueError(f"weight: expected a square window from 1 to {min(grid)}, got {list(weight.shape[1:])}")
    if bias is not None:
        check_tensor("bias", bias, (channels,), x.dtype, x.device)
    check_whole("stride", stride, 1, MOST_STRIDE)
    if not kernel:
        return reference.conv_tokens(x, grid, weight, bias, stride)
    return _conv(x, *grid, weight, bias, stride)
