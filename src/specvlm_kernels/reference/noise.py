"""Counter-based noise in plain torch: Philox4x32-10 in int64 arithmetic, and -log of an exponential.

The same integers as `specvlm_kernels.noise`, bit for bit; the floats made from them may differ in the last bits.
"""

from functools import lru_cache

import torch

MASK_32 = 0xFFFFFFFF
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

#: The stream of `accept_ratio`; 0 is that of draws.
RATIO_STREAM = 1

#: A memoised block covers this many positions, or fewer (a power of two) where that would exceed `BLOCK_VALUES`.
BLOCK_POSITIONS = 64
BLOCK_VALUES = 1 << 20
BLOCKS_KEPT = 32


def philox_integers(
    positions: torch.Tensor, seed: torch.Tensor, vocabulary: int, *, stream: int = 0, first: int = 0
) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.noise.philox_integers`."""
    seed, place = seed[:, None, None], positions.long()[..., None]
    token = torch.arange(first, first + vocabulary, device=positions.device)
    quad = token[0:vocabulary:4] // 4
    counter = (quad & MASK_32, place & MASK_32, (place >> 32) & MASK_32, torch.full_like(place, stream))
    lanes = _philox(counter, (seed & MASK_32, (seed >> 32) & MASK_32))
    return torch.stack(lanes, dim=-1).flatten(-2)[..., :vocabulary]


def race_noise(positions: torch.Tensor, seed: torch.Tensor, vocabulary: int, *, stream: int = 0) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.noise.race_noise`; memoised by block of positions, reads its arguments."""
    size = _block_positions(vocabulary)
    rows = [
        _noise_block(s, position // size, vocabulary, stream, positions.device)[position % size]
        for s, row in zip(seed.tolist(), positions.tolist(), strict=True)
        for position in row
    ]
    if not rows:
        return torch.empty(*positions.shape, vocabulary, device=positions.device)
    return torch.stack(rows).view(*positions.shape, vocabulary)


def uniforms(tokens: torch.Tensor, positions: torch.Tensor, seed: torch.Tensor, *, stream: int) -> torch.Tensor:
    """u of single tokens [B, N] at positions [B, N], fp32 in (0, 1); see `specvlm_kernels.noise`."""
    place = positions.long()
    words = ((tokens // 4) & MASK_32, place & MASK_32, (place >> 32) & MASK_32, torch.full_like(place, stream))
    key = seed[:, None].expand_as(place)
    lanes = torch.stack(_philox(words, (key & MASK_32, (key >> 32) & MASK_32)), dim=-1)
    return _uniform(lanes.gather(-1, (tokens % 4)[..., None])[..., 0])


def _block_positions(vocabulary: int) -> int:
    return max(1, min(BLOCK_POSITIONS, 1 << (BLOCK_VALUES // vocabulary).bit_length() >> 1))


@lru_cache(maxsize=BLOCKS_KEPT)
def _noise_block(seed: int, block: int, vocabulary: int, stream: int, device: torch.device) -> torch.Tensor:
    """The noise of one block of positions, [positions, vocabulary]."""
    size = _block_positions(vocabulary)
    positions = torch.arange(block * size, (block + 1) * size, device=device)[None]
    seeds = torch.tensor([seed], device=device)
    return race(philox_integers(positions, seeds, vocabulary, stream=stream))[0]


def race(integers: torch.Tensor) -> torch.Tensor:
    """g = -log E for an exponential E, from integers in [0, 2^32)."""
    u = _uniform(integers)
    x = 1 - u
    e = torch.where(x == 1, u, -torch.log(x) * u / (1 - x))  # -log1p(-u)
    return -torch.log(e)


def _uniform(integers: torch.Tensor) -> torch.Tensor:
    return ((integers.float() + 0.5) * 2**-32).clamp(max=1 - 2**-24)


def _philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 (Salmon et al., 2011) on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter, key[0])[:4]
    k0, k1 = key
    for _ in range(ROUNDS):
        high_a, low_a = _multiply(ROUND_A, c0)
        high_b, low_b = _multiply(ROUND_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + KEY_A) & MASK_32, (k1 + KEY_B) & MASK_32
    return c0, c1, c2, c3


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of the 64-bit product; by halves of `a`, since torch's int64 is signed."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b  # each below 2^48
    total = (low >> 16) + high
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)
