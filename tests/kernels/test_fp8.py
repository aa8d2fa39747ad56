"""A KV cache of 8 bits: what is written is the nearest e4m3, and attention reads the numbers that it stands for."""

import contextlib
import importlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specvlm_kernels import compact_kv, fp8, reference, tree_attention, write_kv
from specvlm_kernels.kv_cache import _compact_kv_kernel, _write_kv_kernel
from specvlm_kernels.tree_attention import _tree_attention_kernel
from tests.kernels.test_kv_cache import moved, padded
from tests.kernels.test_tree_attention import NAN, Case, assert_close, case_of, problems
from tests.kernels.trees import parents_of
from tests.kernels.watch import launched

FP8 = torch.float8_e4m3fn
FINITE = torch.tensor([byte for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.uint8).view(FP8)


def quantised(case: Case, k_scale: torch.Tensor, v_scale: torch.Tensor) -> tuple[Case, Case]:
    """A case whose caches are e4m3, NaN where no row looks, and the same with the numbers that these stand for."""

    def kept(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (x / scale[..., None, None]).clamp(-448, 448).to(FP8)

    k, v = kept(case.k, k_scale), kept(case.v, v_scale)
    read = [x.double() * scale[..., None, None].double() for x, scale in ((k, k_scale), (v, v_scale))]
    return Case(case.q, k, v, case.kv_len, case.words), Case(case.q.double(), *read, case.kv_len, case.words)


def check_attention(case: Case, device: str, by_row: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = case.k.shape[:2] if by_row else case.k.shape[1:2]
    k_scale, v_scale = (0.005 + 0.02 * torch.rand(shape, generator=generator) for _ in range(2))
    small, exact = quantised(case, k_scale, v_scale)
    scales = {"k_scale": k_scale.to(device), "v_scale": v_scale.to(device)}
    out, lse = tree_attention(*small.to(device).args(), **scales, return_lse=True)
    assert out.dtype == case.q.dtype
    assert_close(out, exact)
    _, expected = reference.tree_attention(*exact.args(), return_lse=True)
    torch.testing.assert_close(lse.cpu().double(), expected, rtol=1e-4, atol=1e-4)


@contextlib.contextmanager
def reading(way: str) -> Iterator[None]:
    """How the kernel reads e4m3 within it: "native", by the hardware's conversion, or "bytes", byte by byte."""
    if way == "native" and not fp8.is_native():
        pytest.skip("this GPU has no e4m3")
    with contextlib.ExitStack() as stack:
        for name in ("tree_attention", "attention_config"):
            module = importlib.import_module(f"specvlm_kernels.{name}")
            stack.enter_context(mock.patch.object(module, "is_native", return_value=way == "native"))
        yield


@pytest.mark.parametrize("way", ["native", "bytes"])
@settings(max_examples=5, deadline=None)
@given(case=problems(12, (torch.float32, torch.float16), head_dims=[32, 72]), by_row=st.booleans())
def test_kernel_gives_the_formula_on_what_is_kept(device, way, case, by_row):
    with reading(way), launched(_tree_attention_kernel):
        check_attention(case, device, by_row)


@pytest.mark.gpu
@settings(max_examples=50, deadline=None)
@given(case=problems(128, (torch.bfloat16, torch.float16, torch.float32)), by_row=st.booleans())
def test_kernel_gives_the_formula_on_what_is_kept_on_a_gpu(case, by_row):
    check_attention(case, "cuda", by_row)


@settings(max_examples=30, deadline=None)
@given(case=problems(40, (torch.float32, torch.bfloat16)), by_row=st.booleans())
def test_reference_gives_the_formula_on_what_is_kept(case, by_row):
    check_attention(case, "cpu", by_row)


@pytest.mark.parametrize("way", ["native", "bytes"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kernel_reads_every_e4m3(device, way, dtype):
    """One slot, so that a row's result is the value that stands there: subnormal numbers, both zeros, the largest."""
    values = torch.stack([FINITE.view(torch.uint8), FINITE.view(torch.uint8).flip(0)]).view(FP8)
    values = torch.cat([values.view(torch.uint8), values.view(torch.uint8)[:, :2]], 1).view(FP8).to(device)
    slab = values.view(4, 1, 1, 128)
    ones = torch.ones(1, device=device)
    q = torch.zeros(4, 1, 1, 128, dtype=dtype, device=device)
    kv_len = torch.zeros(4, dtype=torch.int32, device=device)
    words = torch.ones(4, 1, 1, dtype=torch.int64, device=device)
    with reading(way):
        out = tree_attention(q, slab, slab, kv_len, words, k_scale=ones, v_scale=ones)
    assert torch.equal(out[:, 0, 0], slab[:, 0, 0].to(dtype))


def awkward_numbers() -> torch.Tensor:
    """What e4m3 keeps, halfway between, a hair to either side, too large, too small, NaN; [2, heads, rows, 32]."""
    finite = FINITE.float().sort().values
    halfway = (finite[1:] + finite[:-1]) / 2
    odd = torch.tensor([torch.inf, -torch.inf, NAN, 448.0, 464.0, 464.1, 1e30, 2**-9, 2**-10, 1.01 * 2**-10, 1e-30])
    found = torch.cat([finite, halfway, halfway * (1 + 1e-6), halfway * (1 - 1e-6), odd])
    return torch.cat([found, torch.randn(2048 - len(found), generator=torch.Generator().manual_seed(0))]).view(
        2, 2, 16, 32
    )


def bytes_of(slab: torch.Tensor) -> torch.Tensor:
    return slab.view(torch.uint8).cpu()


def check_write(device: str, dtype: torch.dtype, by_row: bool) -> None:
    numbers = awkward_numbers().to(dtype)
    k, v = numbers[:1], numbers[1:]
    k_scale = torch.tensor([0.5, 3.0]).expand(1, 2) if by_row else torch.tensor([0.5, 3.0])
    v_scale = k_scale.flip(-1)
    slab = torch.full((2, 1, 2, 20, 32), 0x55, dtype=torch.uint8, device=device).view(FP8)
    kv_len = torch.tensor([7], dtype=torch.int32, device=device)
    write_kv(
        slab[0], slab[1], k.to(device), v.to(device), kv_len, k_scale=k_scale.to(device), v_scale=v_scale.to(device)
    )
    expected = torch.full((2, 1, 2, 20, 32), 0x55, dtype=torch.uint8)
    for half, (x, scale) in enumerate(((k, k_scale), (v, v_scale))):
        divided = (x.float() / scale.view(1, 2, 1, 1)).clamp(-448, 448).to(FP8).view(torch.uint8)
        expected[half, :, :, 7:] = divided[:, :, :13]  # the other three do not fit
    no_number = (expected & 0x7F) == 0x7F
    assert torch.equal((bytes_of(slab) & 0x7F) == 0x7F, no_number)
    assert torch.equal(bytes_of(slab).masked_fill(no_number, 0), expected.masked_fill(no_number, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("by_row", [False, True])
def test_write_kernel_keeps_the_nearest(device, dtype, by_row):
    with launched(_write_kv_kernel):
        check_write(device, dtype, by_row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by_row", [False, True])
def test_write_reference_keeps_the_nearest(dtype, by_row):
    check_write("cpu", dtype, by_row)


def check_compaction(device: str) -> None:
    held = torch.arange(2 * 2 * 2 * 2 * 30 * 20).remainder(251).to(torch.uint8).view(2, 2, 2, 2, 30, 20)
    paths = [[2, 3, 7], [1]]
    path, length = (x.to(device) for x in padded(paths, 8))
    cache = held.clone().to(device)
    compact_kv(cache.view(FP8), torch.tensor([10, 3], dtype=torch.int32, device=device), path, length)
    assert torch.equal(cache.cpu(), moved(held, [10, 3], paths))


def test_compact_kernel_moves_bytes(device):
    with launched(_compact_kv_kernel):
        check_compaction(device)


def test_compact_reference_moves_bytes():
    check_compaction("cpu")


def test_what_is_written_is_what_attention_reads(device):
    """With a scale a head that fits its numbers, three bits of mantissa are what is lost."""
    case = case_of([parents_of("random", 6, 0)], [40], (2, 2), 32)
    full = Case(case.q, case.k.nan_to_num(0.0), case.v.nan_to_num(0.0), case.kv_len, case.words).to(device)
    scales = {"k_scale": full.k.abs().amax((0, 2, 3)) / 448, "v_scale": full.v.abs().amax((0, 2, 3)) / 448}
    slab = torch.zeros(2, *full.k.shape, dtype=torch.uint8, device=device).view(FP8)
    start = torch.zeros(1, dtype=torch.int32, device=device)
    write_kv(slab[0], slab[1], full.k, full.v, start, **scales)
    out = tree_attention(full.q, slab[0], slab[1], full.kv_len, full.words, **scales)
    torch.testing.assert_close(out, tree_attention(*full.args()), rtol=0, atol=0.1)


# What is refused.


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (None, r"k_scale: expected a \[2\] or \[1, 2\] tensor for a float8_e4m3fn cache, got None"),
        (0.5, "k_scale: expected a tensor, got float"),
        (torch.ones(3), r"k_scale: expected shape \[2\], got \[3\]"),
        (torch.ones(2, 2), r"k_scale: expected shape \[1, 2\], got \[2, 2\]"),
        (torch.ones(2).double(), "k_scale: expected dtype float32, got float64"),
        (torch.ones(2).to("meta"), "k_scale: expected a tensor on cpu, got meta"),
        (torch.tensor([1.0, 0.0]), r"k_scale: expected finite numbers above 0, got \[1.0, 0.0\]"),
        (torch.tensor([1.0, NAN]), r"k_scale: expected finite numbers above 0, got \[1.0, nan\]"),
    ],
)
def test_a_scale_has_to_fit(scale, message):
    slab = torch.zeros(2, 1, 2, 9, 32, dtype=torch.uint8).view(FP8)
    new, kv_len, ones = torch.zeros(1, 2, 3, 32), torch.zeros(1, dtype=torch.int32), torch.ones(2)
    words = torch.ones(1, 3, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        write_kv(slab[0], slab[1], new, new, kv_len, k_scale=scale, v_scale=ones)
    with pytest.raises(ValueError, match=message):
        tree_attention(new.transpose(1, 2), slab[0], slab[1], kv_len, words, k_scale=scale, v_scale=ones)
    with pytest.raises(ValueError, match=message.replace("k_scale", "v_scale")):
        write_kv(slab[0], slab[1], new, new, kv_len, k_scale=ones, v_scale=scale)


def test_writes_into_fp8_refuse_what_is_no_float():
    slab, new = torch.zeros(2, 1, 2, 9, 32, dtype=torch.uint8).view(FP8), torch.zeros(1, 2, 3, 32)
    start, ones = torch.zeros(1, dtype=torch.int32), torch.ones(2)
    with pytest.raises(ValueError, match="k: expected dtype float32 or float16 or bfloat16, got float64"):
        write_kv(slab[0], slab[1], new.double(), new.double(), start, k_scale=ones, v_scale=ones)
    with pytest.raises(ValueError, match="v: expected dtype float32, got float16"):
        write_kv(slab[0], slab[1], new, new.half(), start, k_scale=ones, v_scale=ones)
    with pytest.raises(ValueError, match="k_scale: expected None, since the cache is float32"):
        write_kv(new, new.clone(), new, new, start, k_scale=ones)


# Inside torch.compile.


def check_compiled(device: str) -> None:
    """A layer's writes and attention over 8 bits, with log-sum-exps: one graph, and the same numbers."""
    case = case_of([parents_of("random", 6, 0)], [40], (2, 2), 32).to(device)
    new, ones = torch.randn(1, 2, 6, 32, device=device), torch.full((2,), 0.02, device=device)
    path, length = (x.to(device) for x in padded([[2, 3]], 6))

    def layer(slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = slab.view(FP8)[0]
        write_kv(k, v, new, -new, case.kv_len, k_scale=ones, v_scale=ones)
        out, lse = tree_attention(case.q, k, v, case.kv_len, case.words, k_scale=ones, v_scale=ones, return_lse=True)
        compact_kv(slab.view(FP8), case.kv_len, path, length)
        return 2 * out, lse + 1

    torch.compiler.reset()
    slabs = [torch.arange(2 * 2 * 60 * 32, device=device).remainder(113).to(torch.uint8) for _ in range(2)]
    slabs = [slab.view(1, 2, 1, 2, 60, 32) for slab in slabs]
    expected = layer(slabs[0])
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(slabs[1])
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert torch.equal(*slabs)


def test_kernels_are_one_graph(device):
    check_compiled(device)


def test_the_reference_is_one_graph():
    check_compiled("cpu")
