"""Counter-based noise: the same number for a token wherever, whenever and beside whatever it is computed.

A draw is the argmax of w + g, with w the logits and g = -log E, E exponential: the first arrival of a race of
exponentials with rates exp(w), so token i wins with probability softmax(w)[i]. The noise of a token is a function of

    key     = the seed's low and high 32 bits
    counter = (token // 4, position low, position high, stream),  lane = token % 4

through Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). No state is kept, nothing is
written to memory, and one call serves four neighbouring tokens.

    u = (r + 1/2) / 2^32, at most 1 - 2^-24
    E = -log1p(-u), computed from x = 1 - u as  u  if x == 1  else  -log(x) u / (1 - x)

The second form cancels the rounding of 1 - u (Higham, "Accuracy and stability", section 1.14.1), which matters: the
smallest E wins the race. The integers are equal on every backend; the floats may differ in their last bits.

Stream 0 is that of draws. `accept_ratio`, whose coins u must not hang on the noise of what was drafted, has stream 1.
"""

import torch
import triton
import triton.language as tl

from ._checks import INTEGERS, check_tensor, check_whole
from ._dispatch import on_device, takes_kernel
from .reference import noise as reference

#: Tokens a program. A multiple of 4, because a Philox call serves four.
TILE = 2048


@triton.jit
def philox_tile(i_first, position, seed, stream, TILE: tl.constexpr):
    """The random words of tokens i_first ... i_first + TILE - 1, [TILE] uint32.

    i_first is a multiple of 4; position and seed are int64.
    """
    o_quad = (i_first // 4 + tl.arange(0, TILE // 4)).to(tl.uint32)
    b_low = tl.full([TILE // 4], position & 0xFFFFFFFF, tl.uint32)
    b_high = tl.full([TILE // 4], (position >> 32) & 0xFFFFFFFF, tl.uint32)
    b_stream = tl.full([TILE // 4], stream, tl.uint32)
    key_low, key_high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    b_0, b_1, b_2, b_3 = tl.philox_impl(o_quad, b_low, b_high, b_stream, key_low, key_high)
    return tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)).reshape(TILE)


@triton.jit
def _uniform(b_word):
    return tl.minimum((b_word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375)


@triton.jit
def uniform(b_token, position, seed, stream):
    """The u of tokens that do not follow one another, or of one, fp32 in (0, 1): a Philox call each; all are int64."""
    b_zero = b_token * 0
    b_0, b_1, b_2, b_3 = tl.philox_impl(
        ((b_token >> 2) & 0xFFFFFFFF).to(tl.uint32),
        (b_zero + (position & 0xFFFFFFFF)).to(tl.uint32),
        (b_zero + ((position >> 32) & 0xFFFFFFFF)).to(tl.uint32),
        (b_zero + stream).to(tl.uint32),
        (seed & 0xFFFFFFFF).to(tl.uint32),
        ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    b_lane = b_token & 3
    return _uniform(tl.where(b_lane < 2, tl.where(b_lane == 0, b_0, b_1), tl.where(b_lane == 2, b_2, b_3)))


@triton.jit
def race(b_u):
    """The noise g made from u."""
    b_x = 1.0 - b_u
    b_e = tl.where(b_x == 1.0, b_u, -tl.log(b_x) * b_u / (1.0 - b_x))
    return -tl.log(b_e)


@triton.jit
def race_tile(i_first, position, seed, stream, TILE: tl.constexpr):
    """The noise g of tokens i_first ... i_first + TILE - 1, [TILE] fp32; i_first is a multiple of 4."""
    return race(_uniform(philox_tile(i_first, position, seed, stream, TILE)))


@triton.jit(do_not_specialize=["first", "stream", "nodes"])
def _noise_kernel(positions, seeds, out, first, stream, nodes, vocabulary, RACE: tl.constexpr, TILE: tl.constexpr):
    i_row, i_tile = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + i_row).to(tl.int64)
    seed = tl.load(seeds + i_row // nodes)
    o_token = i_tile * TILE + tl.arange(0, TILE)
    i_first = first.to(tl.int64) + i_tile * TILE
    if RACE:
        b_out = race_tile(i_first, position, seed, stream, TILE)
    else:
        b_out = philox_tile(i_first, position, seed, stream, TILE).to(tl.int64)
    tl.store(out + i_row.to(tl.int64) * vocabulary + o_token, b_out, mask=o_token < vocabulary)


def launch_noise(
    positions: torch.Tensor, seed: torch.Tensor, out: torch.Tensor, stream: int, first: int
) -> torch.Tensor:
    """Fills `out` [B, N, V]: with words where it is int64, with noise where it is fp32."""
    vocabulary = out.shape[-1]
    with on_device(positions):
        _noise_kernel[(positions.numel(), triton.cdiv(vocabulary, TILE))](
            positions.contiguous(),
            seed.contiguous(),
            out,
            first,
            stream,
            positions.shape[1],
            vocabulary,
            RACE=out.is_floating_point(),
            TILE=TILE,
        )
    return out


def philox_integers(
    positions: torch.Tensor, seed: torch.Tensor, vocabulary: int, *, stream: int = 0, first: int = 0
) -> torch.Tensor:
    """The random words behind the noise of tokens `first` to `first + vocabulary - 1`.

    Args:
        positions: [B, N] int32 or int64, the positions drawn for.
        seed: [B] int64.
        vocabulary: how many tokens.
        stream: a number in [0, 2^32); 0 is the stream of draws.
        first: the first token, a multiple of 4 below 2^34.

    Returns:
        [B, N, vocabulary] int64 in [0, 2^32).

    Raises:
        ValueError: an argument has another shape, dtype, device or value.
    """
    if not _check(positions, seed, vocabulary, stream, first):
        return reference.philox_integers(positions, seed, vocabulary, stream=stream, first=first)
    out = torch.empty(*positions.shape, vocabulary, dtype=torch.int64, device=positions.device)
    return launch_noise(positions, seed, out, stream, first)


def race_noise(positions: torch.Tensor, seed: torch.Tensor, vocabulary: int, *, stream: int = 0) -> torch.Tensor:
    """The noise that draws at `positions` add to the logits: softmax(w) is the law of argmax(w + noise).

    Args:
        positions: [B, N] int32 or int64, the positions drawn for (a node's own position plus 1).
        seed: [B] int64.
        vocabulary: how many tokens, from 0.
        stream: a number in [0, 2^32); 0 is the stream of draws.

    Returns:
        [B, N, vocabulary] fp32.

    Raises:
        ValueError: an argument has another shape, dtype, device or value.
    """
    if not _check(positions, seed, vocabulary, stream, 0):
        return reference.race_noise(positions, seed, vocabulary, stream=stream)
    out = torch.empty(*positions.shape, vocabulary, dtype=torch.float32, device=positions.device)
    return launch_noise(positions, seed, out, stream, 0)


def _check(positions: torch.Tensor, seed: torch.Tensor, vocabulary: int, stream: int, first: int) -> bool:
    """Checks what both ops share; True where the kernel serves."""
    check_tensor("positions", positions, ("B", "N"), INTEGERS)
    kernel = takes_kernel("positions", positions)
    check_tensor("seed", seed, (positions.shape[0],), torch.int64, positions.device)
    check_whole("vocabulary", vocabulary, 1, 2**31 - 1)
    check_whole("stream", stream, 0, 2**32 - 1)
    check_whole("first", first, 0, 2**34 - 4, step=4)
    return kernel
