"""Noise is a function of seed, position and token: known answers, the same words on every backend, the right law."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specvlm_kernels import noise, reference
from specvlm_kernels.reference.noise import BLOCKS_KEPT, _noise_block, race
from tests.kernels.watch import launched

SIXTY_FOUR = st.integers(-(2**63), 2**63 - 1)

# Random123's known answers for philox4x32-10 (kat_vectors): counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(low: int, high: int) -> int:
    """The int64 with these two halves."""
    return ((high << 32 | low) + 2**63) % 2**64 - 2**63


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 as the paper writes it, in Python's integers."""
    c, (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = (b >> 32 ^ c[1] ^ k0, b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k1, a & 0xFFFFFFFF)
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def known_words(device: str, counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    positions = torch.tensor([[signed(counter[1], counter[2])]], device=device)
    seed = torch.tensor([signed(*key)], device=device)
    words = noise.philox_integers(positions, seed, 4, stream=counter[3], first=4 * counter[0])
    return tuple(words.flatten().tolist())


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_kernel_gives_the_known_answers(device, counter, key, words):
    with launched(noise._noise_kernel):
        assert known_words(device, counter, key) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_reference_gives_the_known_answers(counter, key, words):
    assert philox(counter, key) == words
    assert known_words("cpu", counter, key) == words


@settings(max_examples=12, deadline=None)
@given(
    seeds=st.lists(SIXTY_FOUR, min_size=1, max_size=2),
    positions=st.lists(SIXTY_FOUR, min_size=1, max_size=2),
    vocabulary=st.sampled_from([1, 3, 4, 5, 100, noise.TILE, noise.TILE + 1]),
    stream=st.sampled_from([0, 1, 2**32 - 1]),
)
def test_kernel_gives_the_integers_of_the_reference(device, seeds, positions, vocabulary, stream):
    seed = torch.tensor(seeds)
    places = torch.tensor([positions] * len(seeds))
    expected = reference.noise.philox_integers(places, seed, vocabulary, stream=stream)
    with launched(noise._noise_kernel):
        words = noise.philox_integers(places.to(device), seed.to(device), vocabulary, stream=stream)
    assert torch.equal(words.cpu(), expected)


@settings(max_examples=20, deadline=None)
@given(seed=SIXTY_FOUR, position=SIXTY_FOUR, token=st.integers(0, 39), stream=st.integers(0, 2**32 - 1))
def test_reference_counts_by_quad_position_and_stream(seed, position, token, stream):
    words = noise.philox_integers(torch.tensor([[position]]), torch.tensor([seed]), 40, stream=stream)
    counter = (token // 4, position & 0xFFFFFFFF, position >> 32 & 0xFFFFFFFF, stream)
    assert words[0, 0, token] == philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[token % 4]


def test_kernel_gives_the_noise_of_the_reference(device):
    seed = torch.tensor([7, -9])
    positions = torch.arange(40, dtype=torch.int32).view(2, 20)[:, ::5]  # strided
    expected = reference.noise.race_noise(positions, seed, 2 * noise.TILE + 3)
    with launched(noise._noise_kernel):
        got = noise.race_noise(positions.to(device), seed.to(device), 2 * noise.TILE + 3)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_kernel_noise_is_finite_where_the_word_rounds_up_to_one(device):
    # Token 663870 at position 7 under seed 0: in fp32 its word is 2^32, and u would be 1.
    positions, seed = torch.tensor([[7]], device=device), torch.tensor([0], device=device)
    words = noise.philox_integers(positions, seed, 4, first=663868)
    assert words[0, 0, 2] == 4294967242
    with launched(noise._noise_kernel):
        got = noise.launch_noise(positions, seed, torch.empty(1, 1, 4, device=device), 0, 663868)
    assert float(got[0, 0, 2]) == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)
    torch.testing.assert_close(got.cpu(), race(words.cpu()), rtol=1e-5, atol=1e-5)


def test_kernel_takes_no_positions(device):
    empty = torch.empty(1, 0, dtype=torch.int32, device=device)
    assert noise.race_noise(empty, torch.tensor([1], device=device), 5).shape == (1, 0, 5)


def test_reference_noise_is_minus_log_of_an_exponential():
    # Above 0.99 fp32 steps through u too coarsely to compare; those tokens are the ones that lose the race.
    words = torch.randint(0, int(0.99 * 2**32), (10_000,), generator=torch.Generator().manual_seed(0))
    words = torch.cat([words, torch.arange(4)])
    u = (words.double() + 0.5) / 2**32
    torch.testing.assert_close(race(words).double(), -torch.log(-torch.log1p(-u)), rtol=1e-5, atol=1e-5)


def test_reference_noise_is_finite_at_both_ends():
    least, largest = race(torch.tensor([2**32 - 1, 0])).tolist()
    assert least == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)
    assert largest == pytest.approx(33 * math.log(2), rel=1e-6)


def test_reference_noise_has_the_moments_of_a_gumbel():
    g = noise.race_noise(torch.arange(256)[None], torch.tensor([3]), 4000).double()
    assert float(g.mean()) == pytest.approx(0.5772156649, abs=5e-3)
    assert float(g.var()) == pytest.approx(math.pi**2 / 6, rel=1e-2)
    assert abs(float((g[..., 1:] * g[..., :-1]).mean() - g.mean() ** 2)) < 1e-2  # neighbours do not know each other


@pytest.mark.parametrize("vocabulary", [700, 100_000])
def test_reference_noise_does_not_depend_on_what_is_memoised(vocabulary):
    seed, positions = torch.tensor([11]), torch.tensor([[1000, 63, 64, 1000, 0, -1]])
    together = noise.race_noise(positions, seed, vocabulary)
    for i in range(positions.shape[1]):
        _noise_block.cache_clear()
        assert torch.equal(noise.race_noise(positions[:, i : i + 1], seed, vocabulary), together[:, i : i + 1])
    expected = race(noise.philox_integers(positions, seed, vocabulary))
    assert torch.equal(together, expected)


def test_reference_keeps_a_bounded_number_of_blocks():
    positions = torch.arange(0, 64 * 2 * BLOCKS_KEPT, 64)[None]
    noise.race_noise(positions, torch.tensor([5]), 8)
    assert _noise_block.cache_info().currsize <= BLOCKS_KEPT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.zeros(3, dtype=torch.int32)}, r"positions: expected shape \[B, N\], got \[3\]"),
        ({"positions": torch.zeros(1, 3)}, "positions: expected dtype int32 or int64, got float32"),
        (
            {"positions": torch.zeros(1, 3).int().to("meta")},
            "positions: expected a tensor on a cuda or cpu device, got",
        ),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, r"seed: expected shape \[1\], got \[2\]"),
        ({"seed": torch.zeros(1)}, "seed: expected dtype int64, got float32"),
        ({"seed": 3}, "seed: expected a tensor, got int"),
        ({"vocabulary": 0}, "vocabulary: expected a whole number from 1 to 2147483647, got 0"),
        ({"vocabulary": 9.0}, "vocabulary: expected a whole number from 1 to 2147483647, got 9.0"),
        ({"stream": 2**32}, "stream: expected a whole number from 0 to 4294967295, got 4294967296"),
        ({"stream": "1"}, "stream: expected a whole number from 0 to 4294967295, got '1'"),
        ({"first": 6}, "first: expected a multiple of 4 from 0 to 17179869180, got 6"),
        ({"first": 4.0}, "first: expected a multiple of 4 from 0 to 17179869180, got 4.0"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    good = {"positions": torch.zeros(1, 3, dtype=torch.int32), "seed": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        noise.philox_integers(**{**good, "vocabulary": 9, **change})
