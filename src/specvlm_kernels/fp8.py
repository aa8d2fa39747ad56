"""Numbers of 8 bits: a KV cache in float8 e4m3 with one scale a KV head, and weights with one a row.

A value x of head h is kept as `e4m3(x / scale[h])` and read as `scale[h] * stored`. Attention never multiplies a key or
a value by its scale: that of the keys goes into the scale of the scores, that of the values into the result.

Where the hardware converts e4m3 (NVIDIA from compute capability 8.9 on) the kernels load it as what it is; elsewhere as
bytes that they decode themselves. Its 4 bits of exponent and 3 of mantissa, moved to where fp16 keeps the low ones of
its exponent and the high ones of its mantissa, read as the value divided by 2^8, subnormal numbers too: so decoding is
a shift and an exact product. Writing is always by hand: a round writes a few rows.
"""

import torch
import triton
import triton.language as tl

from ._checks import check_tensor, readable
from ._dispatch import INTERPRETED, compute_capability

FP8 = torch.float8_e4m3fn

#: Its largest finite number; what is larger is kept as this. It has no infinity.
FP8_MAX = 448.0

#: Rows of a weight that are in fp32 at a time, while it is quantised or read.
BLOCK_ROWS = 2048


def is_native() -> bool:
    """Whether the current device's own instructions convert e4m3."""
    return INTERPRETED or compute_capability() >= 89


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    """An e4m3 cache as its bytes, any other as it is."""
    return cache.view(torch.uint8) if cache.dtype == FP8 else cache


def check_scale(name: str, scale: object, cache: torch.Tensor, batch: int, heads: int) -> None:
    """Checks that an e4m3 cache comes with a scale, [heads] or [batch, heads] float32 above 0, and another without.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if cache.dtype != FP8:
        if scale is not None:
            dtype = str(cache.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: expected None, since the cache is {dtype} and not float8_e4m3fn, got a scale")
        return
    if scale is None:
        shapes = f"[{heads}] or [{batch}, {heads}]"
        raise ValueError(f"{name}: expected a {shapes} tensor for a float8_e4m3fn cache, got None")
    shape = (batch, heads) if isinstance(scale, torch.Tensor) and scale.dim() == 2 else (heads,)
    found = check_tensor(name, scale, shape, torch.float32, cache.device)
    if readable(found) and not bool(((found > 0) & found.isfinite()).all()):
        raise ValueError(f"{name}: expected finite numbers above 0, got {found.flatten().tolist()}")


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] as e4m3, each row over its scale, and the scales [N] fp32; a row's largest becomes 448."""
    values = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for kept, scale, given in zip(*(x.split(BLOCK_ROWS) for x in (values, scales, weight)), strict=True):
        rows = given.float()
        scale.copy_((rows.abs().amax(dim=1) / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny))
        kept.copy_((rows / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8))
    return values, scales


def dequantized_rows(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `quantize_rows` made, [N, K] in `dtype`."""
    weight = torch.empty(values.shape, dtype=dtype, device=values.device)
    for made, kept, factor in zip(*(x.split(BLOCK_ROWS) for x in (weight, values, scale)), strict=True):
        made.copy_(kept.float() * factor[:, None])
    return weight


def scale_stride(scale: torch.Tensor | None) -> int:
    """From one row of a batch to the next, in a contiguous scale; 0 where all rows share it."""
    return scale.shape[1] if scale is not None and scale.dim() == 2 else 0


@triton.jit
def load_scale(scale, i_b, i_head, stride):
    """The scale of a head, or 1 where the cache has none."""
    return 1.0 if scale is None else tl.load(scale + i_b * stride + i_head)


@triton.jit
def store_rows(p_cache, b_x, scale, i_b, i_head, stride, mask):
    """A block into a cache: as it is, or where the cache has a scale divided by it and rounded to e4m3."""
    if scale is not None:
        b_x = encode(b_x.to(tl.float32) / load_scale(scale, i_b, i_head, stride))
    tl.store(p_cache, b_x, mask=mask)


@triton.jit
def decode(b_x, dtype: tl.constexpr):
    """A loaded block in `dtype`: of e4m3, of bytes that hold it, or of `dtype` itself."""
    if b_x.dtype == tl.uint8:
        b_bits = b_x.to(tl.uint16)
        b_low = b_bits & 0x7F
        # NaN, which is all ones, carries into fp16's highest bit of exponent, and so is NaN there too.
        b_half = (b_low << 7) | (((b_low + 1) & 0x80) << 7) | ((b_bits & 0x80) << 8)
        b_x = (b_half.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0).to(dtype)
    elif b_x.dtype != dtype:
        b_x = b_x.to(tl.float16).to(dtype)
    return b_x


@triton.jit
def encode(b_x):
    """fp32 to the bytes of the nearest e4m3, ties to even, at most 448 in size; NaN stays NaN."""
    b_bits = b_x.to(tl.uint32, bitcast=True)
    b_size = tl.minimum(tl.abs(b_x), 448.0)
    b_size_bits = b_size.to(tl.uint32, bitcast=True)
    # The 20 bits of mantissa that fall away round by carrying; the exponent's bias goes from 127 to 7.
    b_normal = ((b_size_bits + 0x7FFFF + ((b_size_bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the steps are of 2^-9, which are the last bits of a sum of this size.
    b_small = (b_size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    b_byte = tl.where(b_size < 0.015625, b_small, b_normal)
    b_byte = tl.where((b_bits & 0x7FFFFFFF) > 0x7F800000, 0x7F, b_byte)
    return (b_byte | ((b_bits >> 24) & 0x80)).to(tl.uint8)
