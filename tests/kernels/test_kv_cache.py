"""Cache writes and compaction: every slot holds what a list of moves says, and nothing else changed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specvlm_kernels import compact_kv, write_kv
from specvlm_kernels.kv_cache import _compact_kv_kernel, _write_kv_kernel, launch_compact_kv, launch_write_kv
from tests.kernels.watch import launched


def counted(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor in which (up to fp16's 2048) every value tells where it stood."""
    return (torch.arange(torch.Size(shape).numel()) % 2039).reshape(shape).to(dtype)


def moved(cache: torch.Tensor, kv_len: list[int], paths: list[list[int]]) -> torch.Tensor:
    """`compact_kv` by its definition: each move reads what the cache held before the call."""
    out = cache.clone()
    for i_b, (start, path) in enumerate(zip(kv_len, paths, strict=True)):
        for i, node in enumerate(path):
            if start + node < cache.shape[4]:
                out[:, :, i_b, :, start + 1 + i] = cache[:, :, i_b, :, start + node]
    return out


def padded(paths: list[list[int]], nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [path + [-1] * (nodes - len(path)) for path in paths]
    return torch.tensor(rows, dtype=torch.int32), torch.tensor([len(path) for path in paths], dtype=torch.int32)


@st.composite
def compactions(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], list[list[int]], int]:
    """A cache, lengths, ascending paths and the tree's size; some trees reach past the slab."""
    nodes = draw(st.sampled_from([1, 2, 8, 16, 33, 64]))
    batch = draw(st.integers(1, 2))
    longest = 33 if draw(st.booleans()) else 6
    ascending = st.lists(st.integers(1, max(1, nodes - 1)), max_size=min(longest, nodes - 1), unique=True).map(sorted)
    paths = [draw(ascending) for _ in range(batch)]
    lengths = [draw(st.sampled_from([0, 1, 15, 64])) for _ in range(batch)]
    capacity = max(lengths) + nodes - draw(st.sampled_from([0, 0, 1])) + draw(st.sampled_from([0, 5]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    shape = (draw(st.integers(1, 2)), 2, batch, draw(st.integers(1, 2)), max(capacity, *lengths, 1))
    return counted(*shape, draw(st.sampled_from([4, 20, 32])), dtype=dtype), lengths, paths, nodes


def run_compact(cache: torch.Tensor, lengths: list[int], paths: list[list[int]], nodes: int, device: str) -> None:
    path, length = (x.to(device) for x in padded(paths, nodes))
    kv_len = torch.tensor(lengths, dtype=torch.int32, device=device)
    assert compact_kv(cache, kv_len, path, length) is None


@settings(max_examples=25, deadline=None)
@given(problem=compactions())
def test_compact_kernel(device, problem):
    cache, lengths, paths, nodes = problem
    expected = moved(cache, lengths, paths)
    cache = cache.to(device)
    with launched(_compact_kv_kernel):
        run_compact(cache, lengths, paths, nodes, device)
    assert torch.equal(cache.cpu(), expected)


@settings(max_examples=80, deadline=None)
@given(problem=compactions())
def test_compact_reference(problem):
    cache, lengths, paths, nodes = problem
    expected = moved(cache, lengths, paths)
    run_compact(cache, lengths, paths, nodes, "cpu")
    assert torch.equal(cache, expected)


@pytest.mark.gpu
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_compact_kernel_never_overwrites_what_it_has_yet_to_read(seed):
    """Long overlapping moves at a model's size: a missing barrier shows here and nowhere in the interpreter."""
    generator = torch.Generator().manual_seed(seed)
    path = sorted((torch.randperm(127, generator=generator)[:100] + 1).tolist())
    cache = torch.randn(4, 2, 1, 8, 256, 128, generator=generator).bfloat16()
    expected = moved(cache, [100], [path])
    cache = cache.cuda()
    run_compact(cache, [100], [path], 128, "cuda")
    assert torch.equal(cache.cpu(), expected)


def test_compact_kernel_takes_a_strided_slab(device):
    whole = counted(2, 3, 2, 50, 2, 24).to(device)
    cache = whole[:, :2, :, :, :, :20].transpose(3, 4)  # [L, 2, B, Hkv, S, D]
    expected = whole.clone()
    expected[:, :2, :, :, :, :20] = moved(cache.cpu(), [3, 20], [[1, 3, 4], [2, 3]]).transpose(3, 4).to(device)
    with launched(_compact_kv_kernel):
        run_compact(cache, [3, 20], [[1, 3, 4], [2, 3]], 8, device)
    assert torch.equal(whole, expected)


def test_compact_kernel_leaves_everything_be_where_values_are_bad(device):
    """Straight to the launcher, as on a GPU, where values are not looked at."""
    fenced = counted(3, 2, 1, 1, 12, 16).to(device)
    before = fenced.clone()
    cache, int32 = fenced[1:2], {"dtype": torch.int32, "device": device}
    for start, nodes, count in (
        (3, [0, -5, 2, 99], 4),
        (3, [1, 2, 3, 4], 2**30),
        (-9, [8, 9, 10, 11], 4),
        (99, [2], 1),
    ):
        path = torch.tensor([nodes], **int32)
        launch_compact_kv(cache, torch.tensor([start], **int32), path, torch.tensor([count], **int32))
        assert torch.equal(fenced, before)


def test_compact_on_nothing(device):
    cache = counted(2, 2, 1, 1, 12, 16).to(device)
    before = cache.clone()
    run_compact(cache, [5], [[]], 4, device)
    run_compact(cache, [5], [[]], 0, device)
    assert torch.equal(cache, before)


# Writes.


@st.composite
def writes(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """A slab of keys and values, new rows, lengths; some rows land past the slab."""
    batch, heads, rows = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 15, 16, 17, 40]))
    head_dim, capacity = draw(st.sampled_from([4, 20, 32])), draw(st.sampled_from([1, 20, 64]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    lengths = [draw(st.integers(0, capacity)) for _ in range(batch)]
    slab, new = counted(2, batch, heads, capacity, head_dim), -1 - counted(2, batch, heads, rows, head_dim)
    return slab.to(dtype), new.to(dtype), lengths


def written(slab: torch.Tensor, new: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    out = slab.clone()
    for i_b, start in enumerate(lengths):
        for i in range(new.shape[3]):
            if start + i < slab.shape[3]:
                out[:, i_b, :, start + i] = new[:, i_b, :, i]
    return out


@settings(max_examples=25, deadline=None)
@given(problem=writes())
def test_write_kernel(device, problem):
    slab, new, lengths = problem
    expected = written(slab, new, lengths)
    slab, new = slab.to(device), new.to(device)
    with launched(_write_kv_kernel):
        write_kv(slab[0], slab[1], new[0], new[1], torch.tensor(lengths, dtype=torch.int32, device=device))
    assert torch.equal(slab.cpu(), expected)


@settings(max_examples=80, deadline=None)
@given(problem=writes())
def test_write_reference(problem):
    slab, new, lengths = problem
    expected = written(slab, new, lengths)
    assert write_kv(slab[0], slab[1], new[0], new[1], torch.tensor(lengths, dtype=torch.int32)) is None
    assert torch.equal(slab, expected)


def test_write_kernel_takes_strided_tensors(device):
    whole = counted(2, 30, 2, 2, 24).to(device)
    k_cache, v_cache = whole[:, :, 0, :, :20].transpose(1, 2), whole[:, :, 1, :, :20].transpose(1, 2)
    fused = -1 - counted(2, 5, 7, 20).to(device)
    k, v = fused[:, :, 1:3].transpose(1, 2), fused[:, :, 4:6].transpose(1, 2)
    expected = whole.clone()
    expected[0, 7:12, 0, :, :20], expected[0, 7:12, 1, :, :20] = fused[0, :, 1:3], fused[0, :, 4:6]
    expected[1, 28:, 0, :, :20], expected[1, 28:, 1, :, :20] = fused[1, :2, 1:3], fused[1, :2, 4:6]
    with launched(_write_kv_kernel):
        write_kv(k_cache, v_cache, k, v, torch.tensor([7, 28], dtype=torch.int32, device=device))
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("length", [-40, 99, 2**31 - 1])
def test_write_kernel_stays_inside_the_slab_whatever_the_length(device, length):
    fenced = counted(3, 1, 1, 12, 16).to(device)
    before, slab = fenced.clone(), fenced[1]
    new = torch.full((1, 1, 20, 16), -1.0, device=device)
    launch_write_kv(slab, slab, new, new, torch.tensor([length], dtype=torch.int32, device=device))
    assert torch.equal(fenced, before)


def test_write_of_nothing(device):
    slab = counted(2, 1, 2, 12, 16).to(device)
    before = slab.clone()
    write_kv(slab[0], slab[1], slab[0, :, :, :0], slab[1, :, :, :0], torch.zeros(1, dtype=torch.int32, device=device))
    assert torch.equal(slab, before)


@pytest.mark.gpu
def test_cache_kernels_never_wait_for_the_host():
    cache = torch.zeros(2, 2, 1, 2, 100, 64, dtype=torch.bfloat16, device="cuda")
    kv_len = torch.tensor([5], dtype=torch.int32, device="cuda")
    path, length = (x.cuda() for x in padded([[2, 3]], 8))
    new = torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        write_kv(cache[0, 0], cache[0, 1], new, new, kv_len)
        compact_kv(cache, kv_len, path, length)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# What is refused.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cache": torch.zeros(2, 3, 1, 1, 9, 4)}, r"cache: expected shape \[L, 2, B, Hkv, S, D\], got \[2, 3, 1"),
        ({"cache": torch.zeros(2, 2, 1, 1, 9, 4).int()}, "cache: expected dtype float32 .*, got int32"),
        ({"cache": torch.zeros(2, 2, 1, 1, 4, 9).mT}, "cache: expected a contiguous last axis"),
        ({"cache": torch.zeros(2, 2, 1, 1, 9, 4).to("meta")}, "cache: expected a tensor on a cuda or cpu device, got"),
        ({"kv_len": torch.tensor([10], dtype=torch.int32)}, r"kv_len: expected values in \[0, 10\), got \[10, 10\]"),
        ({"kv_len": torch.tensor([1])}, "kv_len: expected dtype int32, got int64"),
        ({"path": torch.tensor([[1, 3]])}, "path: expected dtype int32, got int64"),
        ({"path": torch.zeros(2, 2, dtype=torch.int32)}, r"path: expected shape \[1, N\], got \[2, 2\]"),
        ({"path": torch.tensor([[0, 3]], dtype=torch.int32)}, r"path: expected node indices that ascend .*\[0, 3\]"),
        ({"path": torch.tensor([[3, 3]], dtype=torch.int32)}, r"path: expected node indices that ascend .*\[3, 3\]"),
        ({"path": torch.tensor([[3, -1]], dtype=torch.int32)}, r"path: expected node indices that ascend .*\[3, -1\]"),
        ({"length": torch.tensor([3], dtype=torch.int32)}, r"length: expected values in \[0, 3\), got \[3, 3\]"),
        ({"length": torch.tensor([[1]], dtype=torch.int32)}, r"length: expected shape \[1\], got \[1, 1\]"),
    ],
)
def test_compact_kv_refuses(changed, message):
    arguments = {
        "cache": torch.zeros(2, 2, 1, 1, 9, 4),
        "kv_len": torch.tensor([3], dtype=torch.int32),
        "path": torch.tensor([[1, 3]], dtype=torch.int32),
        "length": torch.tensor([2], dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        compact_kv(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k_cache": torch.zeros(1, 9, 4)}, r"k_cache: expected shape \[B, Hkv, S, D\], got \[1, 9, 4\]"),
        ({"v_cache": torch.zeros(1, 2, 8, 4)}, r"v_cache: expected shape \[1, 2, 9, 4\], got \[1, 2, 8, 4\]"),
        ({"k": torch.zeros(1, 3, 2, 4)}, r"k: expected shape \[1, 2, T, 4\], got \[1, 3, 2, 4\]"),
        ({"k": torch.zeros(1, 2, 3, 4).half()}, "k: expected dtype float32, got float16"),
        ({"v": torch.zeros(1, 2, 2, 4)}, r"v: expected shape \[1, 2, 3, 4\], got \[1, 2, 2, 4\]"),
        ({"k_cache": torch.zeros(1, 2, 9, 4).to("meta")}, "k_cache: expected a tensor on a cuda or cpu device, got"),
        ({"k_cache": torch.zeros(1, 2, 4, 9).mT}, "k_cache: expected a contiguous last axis"),
        ({"v_cache": torch.zeros(1, 2, 4, 9).mT}, "v_cache: expected a contiguous last axis"),
        ({"k": torch.zeros(1, 2, 4, 3).mT}, "k: expected a contiguous last axis"),
        ({"v": torch.zeros(1, 2, 4, 3).mT}, "v: expected a contiguous last axis"),
        ({"kv_len": torch.tensor([-1], dtype=torch.int32)}, r"kv_len: expected values in \[0, 10\), got \[-1, -1\]"),
        ({"kv_len": torch.tensor([1, 1], dtype=torch.int32)}, r"kv_len: expected shape \[1\], got \[2\]"),
    ],
)
def test_write_kv_refuses(changed, message):
    cache, new = torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 3, 4)
    kv_len = torch.tensor([3], dtype=torch.int32)
    arguments = {"k_cache": cache, "v_cache": cache.clone(), "k": new, "v": new, "kv_len": kv_len}
    with pytest.raises(ValueError, match=message):
        write_kv(**{**arguments, **changed})
