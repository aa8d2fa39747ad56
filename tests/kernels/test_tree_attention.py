"""Tree attention: the kernel and the reference against one softmax a row over the slots that the row sees."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specvlm_kernels import pack_ancestors, reference, tree_attention
from specvlm_kernels.ancestors import _pack_ancestors_kernel, launch_pack_ancestors
from specvlm_kernels.tree_attention import (
    TreeAttentionConfig,
    _tree_attention_kernel,
    _tree_attention_merge_kernel,
    default_config,
    launch_tree_attention,
)
from tests.kernels.trees import parents_of, trees
from tests.kernels.watch import launched

NAN = float("nan")
HEADS = [(1, 1), (2, 1), (1, 7), (2, 3), (3, 2)]  # KV heads, group
HEAD_DIMS = [32, 33, 64, 72, 80, 96, 128]
LENGTHS = [0, 1, 15, 31, 32, 33, 63, 64, 65, 127, 128, 129]


@dataclass
class Case:
    """Arguments of one call; keys and values are NaN wherever no row looks."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv_len: torch.Tensor
    words: torch.Tensor

    def rows(self, rows: list[int]) -> "Case":
        """The call of some of the rows, as when a tree grows."""
        return Case(self.q[:, rows], self.k, self.v, self.kv_len, self.words[:, rows])

    def to(self, device: str) -> "Case":
        return Case(*(x.to(device) for x in (self.q, self.k, self.v, self.kv_len, self.words)))

    def args(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v, self.kv_len, self.words


def case_of(
    parents: list[list[int]],
    lengths: list[int],
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 32,
    *,
    dtype: torch.dtype = torch.float32,
    room: int = 3,
    seed: int = 0,
) -> Case:
    """A batch of trees of equal size over prefixes of `lengths` slots; `room` slots behind the longest."""
    generator = torch.Generator().manual_seed(seed)
    (kv_heads, group), batch, nodes = heads, len(parents), len(parents[0])
    capacity = max(max(lengths) + nodes + room, 1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    q, slab = draw(batch, nodes, kv_heads * group, head_dim), draw(2, batch, kv_heads, capacity, head_dim)
    words = reference.pack_ancestors(torch.tensor(parents, dtype=torch.int32))
    kv_len = torch.tensor(lengths, dtype=torch.int32)
    unseen = ~visible(words, kv_len, capacity).any(1)
    slab.masked_fill_(unseen[None, :, None, :, None], NAN)
    return Case(q, slab[0], slab[1], kv_len, words)


def visible(words: torch.Tensor, kv_len: torch.Tensor, capacity: int) -> torch.Tensor:
    """[B, Q, S]: which slots each row sees, slot by slot from the definition."""
    seen = torch.zeros(*words.shape[:2], capacity, dtype=torch.bool)
    for i_b, start in enumerate(kv_len.tolist()):
        for row, bits in zip(seen[i_b], words[i_b].tolist(), strict=True):
            row[:start] = True
            for j in range(64 * len(bits)):
                if start + j < capacity:
                    row[start + j] = bool(bits[j // 64] >> (j % 64) & 1)
    return seen


def formula(case: Case, dtype: torch.dtype, scale: float | None = None) -> torch.Tensor:
    """A softmax a row, over the keys that it sees and nothing else, in `dtype`."""
    q, k, v = (x.cpu().to(dtype) for x in (case.q, case.k, case.v))
    seen = visible(case.words.cpu(), case.kv_len.cpu(), k.shape[2])
    group = q.shape[2] // k.shape[1]
    out = torch.zeros(q.shape, dtype=dtype)
    for i_b in range(q.shape[0]):
        for i in range(q.shape[1]):
            slots = seen[i_b, i].nonzero()[:, 0]
            keys = k[i_b, :, slots].repeat_interleave(group, 0)  # [Hq, slots, D]
            values = v[i_b, :, slots].repeat_interleave(group, 0)
            scores = torch.einsum("hd,hsd->hs", q[i_b, i], keys) * (scale or q.shape[-1] ** -0.5)
            out[i_b, i] = torch.einsum("hs,hsd->hd", scores.softmax(-1), values)
    return out


def extended_formula(case: Case, scale: float | None = None) -> torch.Tensor:
    """`formula` with more bits than float64 has, rounded to float64 at the end."""
    q, k, v = (x.cpu().numpy().astype(np.longdouble) for x in (case.q, case.k, case.v))
    seen = visible(case.words.cpu(), case.kv_len.cpu(), k.shape[2]).numpy()
    group = q.shape[2] // k.shape[1]
    out = np.zeros(q.shape)
    for i_b, i in np.ndindex(q.shape[:2]):
        keys, values = (x[i_b][:, seen[i_b, i]].repeat(group, 0) for x in (k, v))  # [Hq, slots, D]
        if keys.size:
            scores = np.einsum("hd,hsd->hs", q[i_b, i], keys) * (scale or q.shape[-1] ** -0.5)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[i_b, i] = np.einsum("hs,hsd->hd", weights / weights.sum(1, keepdims=True), values)
    return torch.from_numpy(out)


def assert_close(out: torch.Tensor, case: Case, scale: float | None = None) -> None:
    """At most twice the error of plain torch in the same dtype, and a few roundings of the result."""
    exact = extended_formula(case, scale) if out.dtype == torch.float64 else formula(case, torch.float64, scale)
    plain = formula(case, out.dtype, scale)
    error = (out.cpu().double() - exact).abs().max()
    floor = 4 * torch.finfo(out.dtype).eps * (1 + exact.abs().max())
    assert error <= 2 * (plain.double() - exact).abs().max() + floor


@st.composite
def problems(
    draw: st.DrawFn,
    max_nodes: int,
    dtypes: tuple[torch.dtype, ...],
    *,
    min_nodes: int = 1,
    heads: list[tuple[int, int]] = HEADS,
    head_dims: list[int] = HEAD_DIMS,
) -> Case:
    first = draw(trees(max_nodes, min_nodes))
    batch = draw(st.integers(1, 2))
    others = [parents_of("random", len(first), draw(st.integers(0, 99))) for _ in range(batch - 1)]
    return case_of(
        [first, *others],
        draw(st.lists(st.sampled_from(LENGTHS), min_size=batch, max_size=batch)),
        draw(st.sampled_from(heads)),
        draw(st.sampled_from(head_dims)),
        dtype=draw(st.sampled_from(dtypes)),
        room=draw(st.sampled_from([0, 1, 70])),
        seed=draw(st.integers(0, 99)),
    )


# The kernel.


def check_kernel(case: Case, device: str) -> None:
    moved = case.to(device)
    kv_heads, capacity = case.k.shape[1:3]
    one_split = capacity <= default_config(capacity, kv_heads, case.q.dtype).split
    kernels = [_tree_attention_kernel] + [_tree_attention_merge_kernel] * (not one_split)
    with launched(*kernels):
        out = tree_attention(*moved.args())
    assert out.dtype == case.q.dtype
    assert out.shape == case.q.shape
    assert out.is_contiguous()
    assert_close(out, case)


@settings(max_examples=20, deadline=None)
@given(case=problems(24, (torch.float32, torch.float16)))
def test_kernel_gives_the_formula(device, case):
    check_kernel(case, device)


@settings(max_examples=5, deadline=None)
@given(case=problems(128, (torch.float32, torch.float16), min_nodes=25, heads=[(1, 1), (1, 3)], head_dims=[32]))
def test_kernel_gives_the_formula_on_some_larger_trees(device, case):
    check_kernel(case, device)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(case=problems(128, (torch.float32, torch.float16)))
def test_kernel_gives_the_formula_on_larger_trees(device, case):
    check_kernel(case, device)


@pytest.mark.gpu
@settings(max_examples=100, deadline=None)
@given(case=problems(128, (torch.bfloat16, torch.float16, torch.float32)))
def test_kernel_gives_the_formula_on_a_gpu(case):
    check_kernel(case, "cuda")


@pytest.mark.parametrize("nodes", [1, 63, 64, 65, 128])
@pytest.mark.parametrize("length", [0, 37])
def test_kernel_reads_every_word(device, nodes, length):
    check_kernel(case_of([parents_of("random", nodes, 3)], [length], (1, 1), 32), device)


@pytest.mark.parametrize("kind", ["chain", "star"])
def test_kernel_on_trees_with_bit_63(device, kind):
    check_kernel(case_of([parents_of(kind, 70, 0)], [60], (1, 1), 32), device)


@pytest.mark.parametrize(
    "config",
    [
        TreeAttentionConfig(split=16, block_m=16, block_n=16),
        TreeAttentionConfig(split=64, block_m=16, block_n=32),
        TreeAttentionConfig(split=128, block_m=64, block_n=64),
        TreeAttentionConfig(split=4096, block_m=128, block_n=64),
    ],
    ids=str,
)
def test_kernel_under_every_cut(device, config):
    case = case_of([parents_of("random", 9, 0), parents_of("star", 9, 0)], [150, 3], (2, 3), 64)
    out = launch_tree_attention(*case.to(device).args(), 64**-0.5, config)
    assert_close(out, case)


def test_kernel_takes_strided_tensors(device):
    case = case_of([parents_of("random", 5, 0), parents_of("chain", 5, 0)], [40, 7], (2, 2), 32, dtype=torch.float16)
    moved = case.to(device)
    batch, kv_heads, capacity, head_dim = case.k.shape
    fused = torch.full((batch, 5, 4 + 4, head_dim), NAN, dtype=torch.float16, device=device)
    slab = torch.full((batch, capacity, 2, kv_heads, head_dim + 8), NAN, dtype=torch.float16, device=device)
    table = torch.zeros(batch, 2, dtype=torch.int32, device=device)
    q, k, v = fused[:, :, :4], slab[:, :, 0, :, :head_dim].transpose(1, 2), slab[:, :, 1, :, :head_dim].transpose(1, 2)
    words = torch.zeros(batch, 9, 2, dtype=torch.int64, device=device)[:, ::2, :1]
    kv_len = table[:, 1]
    for view, dense in zip((q, k, v, kv_len, words), moved.args(), strict=True):
        view.copy_(dense)
    with launched(_tree_attention_kernel):
        out = tree_attention(q, k, v, kv_len, words)
    assert torch.equal(out, tree_attention(*moved.args()))
    assert_close(out, case)


def test_kernel_drops_the_part_of_a_tree_past_the_slab(device):
    case = case_of([parents_of("chain", 10, 0)], [60], (1, 1), 32)
    case.k, case.v = case.k[:, :, :66], case.v[:, :, :66]
    with launched(_tree_attention_kernel):
        out = tree_attention(*case.to(device).args())
    assert_close(out, case)


def test_kernel_gives_zeros_to_a_row_that_sees_nothing(device):
    case = case_of([parents_of("star", 3, 0)], [0], (1, 2), 32)
    case.words[:, 1] = 0
    case.k[:, :, 1] = case.v[:, :, 1] = NAN
    with launched(_tree_attention_kernel):
        out = tree_attention(*case.to(device).args())
    assert not out[:, 1].any()
    assert_close(out[:, [0, 2]], case.rows([0, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads", [(2, 1), (1, 7)])
def test_kernel_gives_a_row_the_same_bits_in_any_company(device, dtype, heads):
    case = case_of([parents_of("random", 20, 1)], [150], heads, 64, dtype=dtype, room=60)
    moved = case.to(device)
    together = tree_attention(*moved.args())
    for rows in ([0], [19], [3, 17], [10, 11, 12, 13, 14]):
        with launched(_tree_attention_kernel, _tree_attention_merge_kernel):
            alone = tree_attention(*moved.rows(rows).args())
        assert torch.equal(alone, together[:, rows])


def test_kernel_gives_a_row_the_same_bits_in_any_batch(device):
    case = case_of([parents_of("random", 7, i) for i in range(3)], [150, 0, 33], (2, 2), 32, room=90).to(device)
    together = tree_attention(*case.args())
    for i_b in range(3):
        alone = tree_attention(*(x[i_b : i_b + 1] for x in case.args()))
        assert torch.equal(alone[0], together[i_b])


def test_kernel_grows_a_tree_level_by_level(device):
    """Only the nodes so far are written: later slots still hold NaN."""
    parents = parents_of("random", 20, 5)
    case = case_of([parents], [70], (2, 2), 32)
    whole = tree_attention(*case.to(device).args())
    for first, last in ((0, 1), (1, 6), (6, 20)):
        grown = case.rows(list(range(first, last)))
        grown.k, grown.v = grown.k.clone(), grown.v.clone()
        grown.k[:, :, 70 + last :] = grown.v[:, :, 70 + last :] = NAN
        assert torch.equal(tree_attention(*grown.to(device).args()), whole[:, first:last])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_kernel_on_an_empty_batch(device, shape):
    batch, queries = shape
    q = torch.empty(batch, queries, 4, 32, device=device)
    slab = torch.empty(2, batch, 2, 50, 32, device=device)
    kv_len = torch.zeros(batch, dtype=torch.int32, device=device)
    words = torch.zeros(batch, queries, 1, dtype=torch.int64, device=device)
    assert tree_attention(q, slab[0], slab[1], kv_len, words).shape == q.shape


def test_kernel_takes_a_scale(device):
    case = case_of([parents_of("random", 5, 0)], [20], (1, 1), 32)
    assert_close(tree_attention(*case.to(device).args(), scale=0.5), case, scale=0.5)


@pytest.mark.parametrize("length", [-5, 1000])
def test_kernel_stays_inside_the_slab_whatever_the_length(device, length):
    case = case_of([parents_of("chain", 4, 0)], [30], (1, 1), 32).to(device)
    inside = torch.randn(1, 1, 40, 32).to(device)
    kv_len = torch.tensor([length], dtype=torch.int32, device=device)
    fenced = torch.full((1, 3, 40, 32), NAN, device=device)
    fenced[:, 1:2] = inside
    config = default_config(40, 1, torch.float32)
    slab = fenced[:, 1:2]
    assert launch_tree_attention(case.q[:, :, :1], slab, slab, kv_len, case.words, 1.0, config).isfinite().all()


@pytest.mark.gpu
def test_kernel_never_waits_for_the_host():
    case = case_of([parents_of("random", 60, 0)], [500], (4, 2), 128, dtype=torch.bfloat16).to("cuda")
    parents = torch.tensor([parents_of("random", 60, 0)], dtype=torch.int32, device="cuda")
    tree_attention(*case.args())
    torch.cuda.set_sync_debug_mode("error")
    try:
        pack_ancestors(parents)
        tree_attention(*case.args())
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Ancestors.


def paths(parents: list[int]) -> list[list[int]]:
    """The words of each row, climbed one parent at a time."""
    found = []
    for i in range(len(parents)):
        bits, node = 0, i
        while node >= 0:
            bits |= 1 << node
            node = parents[node]
        words = [bits >> 64 * w & (2**64 - 1) for w in range(-(-len(parents) // 64))]
        found.append([word - 2**64 if word >= 2**63 else word for word in words])
    return found


@settings(max_examples=20, deadline=None)
@given(tree=trees(130))
def test_pack_ancestors_kernel(device, tree):
    parents = torch.tensor([tree, parents_of("random", len(tree), 0)], dtype=torch.int32, device=device)
    with launched(_pack_ancestors_kernel):
        words = pack_ancestors(parents)
    assert words.tolist() == [paths(row) for row in parents.tolist()]


@pytest.mark.parametrize("nodes", [63, 64, 65, 128, 129])
def test_pack_ancestors_kernel_at_the_sign_bit(device, nodes):
    chain = torch.tensor([parents_of("chain", nodes, 0)], dtype=torch.int32, device=device)
    assert pack_ancestors(chain).tolist() == [paths(chain[0].tolist())]


def test_pack_ancestors_kernel_ends_a_path_at_a_bad_parent(device):
    parents = torch.tensor([[-1, 1, 9, -7, 3, 2**31 - 1, 4]], dtype=torch.int32, device=device)
    assert launch_pack_ancestors(parents)[0, :, 0].tolist() == [1, 2, 4, 8, 24, 32, 88]


def test_pack_ancestors_kernel_takes_strided_and_empty_tensors(device):
    wide = torch.tensor([[-1, 7, 0, 7, 0], [-1, 7, -1, 7, 1]], dtype=torch.int32, device=device)
    assert pack_ancestors(wide[:, ::2])[..., 0].tolist() == [[1, 3, 5], [1, 2, 6]]
    assert pack_ancestors(wide[:0]).shape == (0, 5, 1)
    assert pack_ancestors(wide[:, :0]).shape == (2, 0, 0)


# The reference, which serves on CPU.


@settings(max_examples=60, deadline=None)
@given(case=problems(70, (torch.float64, torch.float32, torch.float16, torch.bfloat16)))
def test_reference_gives_the_formula(case):
    out = tree_attention(*case.args())
    assert out.dtype == case.q.dtype
    assert out.is_contiguous()
    assert_close(out, case)


def test_reference_gives_zeros_to_a_row_that_sees_nothing():
    case = case_of([parents_of("star", 3, 0), parents_of("chain", 3, 0)], [0, 0], (1, 2), 32)
    case.words[0, 1], case.words[1] = 0, 0
    case.k[0, :, 1] = case.v[0, :, 1] = case.k[1] = case.v[1] = NAN
    out = tree_attention(*case.args())
    assert not out[0, 1].any()
    assert not out[1].any()
    assert_close(out[:1, [0, 2]], Case(*(x[:1] for x in case.rows([0, 2]).args())))


def test_reference_drops_the_part_of_a_tree_past_the_slab():
    case = case_of([parents_of("chain", 10, 0)], [60], (1, 1), 32)
    case.k, case.v = case.k[:, :, :66], case.v[:, :, :66]
    assert_close(tree_attention(*case.args()), case)


def test_reference_takes_strided_and_empty_tensors():
    case = case_of([parents_of("random", 5, 0)], [40], (2, 2), 32)
    slab = torch.full((1, case.k.shape[2], 2, 2, 40), NAN)
    k, v = slab[:, :, 0, :, :32].transpose(1, 2), slab[:, :, 1, :, :32].transpose(1, 2)
    q = torch.full((1, 4, 5, 40), NAN)[..., :32].transpose(1, 2)
    q.copy_(case.q)
    k.copy_(case.k)
    v.copy_(case.v)
    assert torch.equal(tree_attention(q, k, v, case.kv_len, case.words), tree_attention(*case.args()))
    assert tree_attention(q[:, :0], k, v, case.kv_len, case.words[:, :0]).shape == (1, 0, 4, 32)


def test_reference_works_inside_and_outside_inference_mode():
    """What is remembered of a tree once came out as an inference tensor, unusable where gradients are on."""
    case = case_of([parents_of("random", 5, 7)], [11], seed=7)
    with torch.inference_mode():
        inside = tree_attention(*case.args())
    case.q.requires_grad_()
    outside = tree_attention(*case.args())
    outside.sum().backward()
    assert torch.equal(inside, outside)


@settings(max_examples=60, deadline=None)
@given(tree=trees(130))
def test_pack_ancestors_reference(tree):
    parents = torch.tensor([tree], dtype=torch.int32)
    assert pack_ancestors(parents).tolist() == [paths(tree)]


# What is refused.


def bad(**changed: object) -> dict[str, object]:
    case = case_of([parents_of("star", 3, 0)], [5], (2, 2), 32, room=2)
    named = dict(zip(("q", "k_cache", "v_cache", "kv_len", "ancestors"), case.args(), strict=True))
    return {name: change(named[name]) if callable(change) else change for name, change in {**named, **changed}.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": [1.0]}, "q: expected a tensor, got list"),
        ({"q": lambda q: q[0]}, r"q: expected shape \[B, Q, Hq, D\], got \[3, 4, 32\]"),
        ({"q": lambda q: q.int()}, "q: expected dtype float32 or float16 or bfloat16 or float64, got int32"),
        ({"q": lambda q: q[:, :, :3]}, "q: expected a multiple of k_cache's 2 heads, got 3"),
        ({"q": lambda q: q[..., ::2]}, r"k_cache: expected shape \[1, Hkv, S, 16\], got \[1, 2, 10, 32\]"),
        ({"q": lambda q: q.transpose(2, 3).contiguous().transpose(2, 3)}, "q: expected a contiguous last axis"),
        ({"k_cache": lambda k: k.half()}, "k_cache: expected dtype float32 or float8_e4m3fn, got float16"),
        ({"k_cache": lambda k: k.mT.contiguous().mT}, "k_cache: expected a contiguous last axis"),
        ({"v_cache": lambda v: v[:, :, :7]}, r"v_cache: expected shape \[1, 2, 10, 32\], got \[1, 2, 7, 32\]"),
        ({"v_cache": lambda v: v.mT.contiguous().mT}, "v_cache: expected a contiguous last axis"),
        ({"kv_len": lambda n: n.long()}, "kv_len: expected dtype int32, got int64"),
        ({"kv_len": lambda n: n.repeat(2)}, r"kv_len: expected shape \[1\], got \[2\]"),
        ({"kv_len": lambda n: n + 6}, r"kv_len: expected values in \[0, 11\), got \[11, 11\]"),
        ({"kv_len": lambda n: -n}, r"kv_len: expected values in \[0, 11\), got \[-5, -5\]"),
        ({"kv_len": lambda n: n.to("meta")}, "kv_len: expected a tensor on cpu, got meta"),
        ({"ancestors": lambda a: a[:, :2]}, r"ancestors: expected shape \[1, 3, W\], got \[1, 2, 1\]"),
        ({"ancestors": lambda a: a.int()}, "ancestors: expected dtype int64, got int32"),
        ({"q": lambda q: q.to("meta")}, "q: expected a tensor on a cuda or cpu device, got meta"),
        ({"k_scale": torch.ones(2)}, "k_scale: expected None, since the cache is float32 and not float8_e4m3fn"),
        ({"v_scale": torch.ones(2)}, "v_scale: expected None, since the cache is float32 and not float8_e4m3fn"),
        ({"scale": NAN}, "scale: expected a finite number, got nan"),
        ({"scale": -float("inf")}, "scale: expected a finite number, got -inf"),
        ({"scale": "0.5"}, "scale: expected a finite number, got '0.5'"),
    ],
)
def test_tree_attention_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        tree_attention(**bad(**arguments))


@pytest.mark.parametrize("head_dim", [31, 129])
def test_tree_attention_refuses_a_head_that_no_tile_fits(head_dim):
    slab = torch.zeros(1, 1, 4, head_dim)
    with pytest.raises(ValueError, match=f"q: expected a head size from 32 to 128, got {head_dim}"):
        tree_attention(
            slab.transpose(1, 2)[:, :1], slab, slab, torch.zeros(1, dtype=torch.int32), torch.ones(1, 1, 1).long()
        )


def test_kernel_refuses_fp64(device):
    case = case_of([parents_of("star", 3, 0)], [5], dtype=torch.float64).to(device)
    with pytest.raises(ValueError, match="q: expected dtype float32 or float16 or bfloat16, got float64"):
        tree_attention(*case.args())


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_kernel_refuses_to_lose_a_gradient(device, name):
    case = case_of([parents_of("star", 3, 0)], [5]).to(device)
    getattr(case, name).requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name}(_cache)?: expected a tensor that needs no gradient"):
        tree_attention(*case.args())
    with torch.no_grad():
        assert not tree_attention(*case.args()).requires_grad


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        (
            torch.zeros(1, 3, dtype=torch.int32, device="meta"),
            "parents: expected a tensor on a cuda or cpu device, got",
        ),
        (torch.zeros(3, dtype=torch.int32), r"parents: expected shape \[B, N\], got \[3\]"),
        (torch.zeros(1, 3, dtype=torch.int64), "parents: expected dtype int32, got int64"),
        (torch.tensor([[-1, 1]], dtype=torch.int32), r"parents: expected parents\[b, i\] in \[-1, i\), got .*1\] = 1"),
        (torch.tensor([[-2, 0]], dtype=torch.int32), r"parents: expected parents\[b, i\] in \[-1, i\), got .*0\] = -2"),
    ],
)
def test_pack_ancestors_refuses(parents, message):
    with pytest.raises(ValueError, match=message):
        pack_ancestors(parents)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": 100}, "split: expected a positive multiple of block_n = 64, got 100"),
        ({"split": 0}, "split: expected a positive multiple"),
        ({"split": 128, "block_n": 128}, "block_n: expected 16, 32 or 64, got 128"),
        ({"split": 128, "block_m": 48}, "block_m: expected a power of two of at least 16, got 48"),
    ],
)
def test_config_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        TreeAttentionConfig(**settings)


@settings(max_examples=200, deadline=None)
@given(
    capacity=st.integers(1, 2**20),
    kv_heads=st.integers(1, 600),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_default_config_fits_every_slab(capacity, kv_heads, dtype):
    config = default_config(capacity, kv_heads, dtype)
    assert config.split % config.block_n == 0
    assert -(-capacity // config.split) * kv_heads < 512 + kv_heads
