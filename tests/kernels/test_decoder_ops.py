"""What lies between a decoder layer's products: against Hugging Face's Llama, and kernels against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from specvlm_kernels import add_rms_norm, gated_silu, reference, rotary_write_kv
from specvlm_kernels.decoder_ops import (
    GATED_COLUMNS,
    MOST_WIDTH,
    _add_rms_norm_kernel,
    _gated_silu_kernel,
    _rotary_write_kv_kernel,
    launch_rotary_write_kv,
)
from tests.kernels.tokens import assert_close, moved, normal
from tests.kernels.watch import launched

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


# Sum and norm.


@st.composite
def norms(draw):
    batch, rows, parts = draw(st.integers(1, 2)), draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 5]))
    width, dtype, seed = draw(st.sampled_from([1, 3, 64, 200, 1025])), draw(DTYPES), draw(st.integers(0, 9))
    x = normal(batch, rows, width, seed=seed, dtype=dtype)
    return {
        "x": normal(parts, batch, rows, width, seed=seed) if parts else x,
        "residual": draw(st.sampled_from([None, normal(batch, rows, width, seed=seed + 1, dtype=dtype)])),
        "weight": normal(width, seed=seed + 2, dtype=dtype),
        "eps": draw(st.sampled_from([0.25, 1e-5])),
    }


def exact_norm(x, residual, weight, eps):
    """By the formula, of the sum as it is stored."""
    total = (x.double().sum(0) if x.dim() == 4 else x.double()) + (0 if residual is None else residual.double())
    stored = total.to(weight.dtype).double()
    return weight.double() * stored / (stored.square().mean(-1, keepdim=True) + eps).sqrt(), total


def check_norm(got, case):
    """Within the roundings of the results, and of a sum that fell to the other side."""
    normed, total = exact_norm(**case)
    for one, exact in zip(got, (normed, total), strict=True):
        assert (one.shape, one.dtype) == (exact.shape, case["weight"].dtype)
        if one.numel():
            error = (one.cpu().double() - exact).abs().max()
            assert error <= 4 * torch.finfo(one.dtype).eps * (1 + exact.abs().max())


@settings(max_examples=25, deadline=None)
@given(case=norms())
def test_norm_kernel(device, case):
    if case["x"].numel():
        with launched(_add_rms_norm_kernel):
            got = add_rms_norm(**moved(case, device))
    else:
        got = add_rms_norm(**moved(case, device))
    check_norm(got, case)


@settings(max_examples=60, deadline=None)
@given(case=norms())
def test_norm_reference(case):
    check_norm(add_rms_norm(**case), case)


def test_norm_of_a_stream_that_nothing_is_added_to_returns_it():
    x = normal(2, 3, 8)
    assert add_rms_norm(x, None, torch.ones(8), eps=0.0)[1] is x


def test_norm_kernel_takes_strided_tensors(device):
    wide, residual = normal(3, 2, 5, 2 * 96).to(device), normal(5, 2, 96, seed=1).transpose(0, 1).to(device)
    case = {"x": wide[..., ::2], "residual": residual, "weight": normal(192).to(device)[::2], "eps": 1e-3}
    with launched(_add_rms_norm_kernel):
        got = add_rms_norm(**case)
    check_norm(got, moved(case, "cpu"))


def test_a_rows_norm_does_not_hang_on_its_company(device):
    x, residual, weight = (normal(*shape, seed=i).to(device) for i, shape in enumerate(((1, 9, 77), (1, 9, 77), (77,))))
    with launched(_add_rms_norm_kernel):
        together, sums = add_rms_norm(x, residual, weight, eps=1e-5)
        for i in range(9):
            alone, total = add_rms_norm(x[:, i : i + 1], residual[:, i : i + 1], weight, eps=1e-5)
            assert torch.equal(alone, together[:, i : i + 1])
            assert torch.equal(total, sums[:, i : i + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_is_that_of_hugging_face(dtype):
    module, x = LlamaRMSNorm(64, eps=1e-3).to(dtype), normal(2, 5, 64, dtype=dtype)
    module.weight.data = normal(64, seed=1, dtype=dtype)
    with torch.no_grad():
        normed, _ = add_rms_norm(x, None, module.weight, eps=1e-3)
        torch.testing.assert_close(normed, module(x), rtol=3 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(3, 8)}, r"x: expected shape \[B, T, 8\], got \[3, 8\]"),
        ({"x": torch.zeros(2, 3, 8).half()}, "x: expected dtype float32, got float16"),
        ({"x": torch.zeros(4, 2, 3, 8).half()}, "x: expected dtype float32, got float16"),
        ({"x": torch.zeros(0, 2, 3, 8)}, "x: expected at least one part, got none"),
        ({"residual": torch.zeros(2, 2, 8)}, r"residual: expected shape \[2, 3, 8\], got \[2, 2, 8\]"),
        ({"residual": torch.zeros(2, 3, 8).double()}, "residual: expected dtype float32, got float64"),
        ({"weight": torch.zeros(8, 1)}, r"weight: expected shape \[H\], got \[8, 1\]"),
        ({"weight": torch.zeros(8).int()}, "weight: expected dtype float32 .*, got int32"),
        ({"weight": torch.zeros(8).to("meta")}, "weight: expected a tensor on a cuda or cpu device, got"),
        ({"eps": -1e-6}, "eps: expected a number of at least 0, got -1e-06"),
        ({"eps": float("nan")}, "eps: expected a finite number, got nan"),
    ],
)
def test_add_rms_norm_refuses(changed, message):
    arguments = {"x": torch.zeros(2, 3, 8), "residual": torch.zeros(2, 3, 8), "weight": torch.ones(8), "eps": 1e-5}
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**arguments | changed)


@pytest.mark.interpreter
def test_the_norm_kernel_refuses_what_only_the_reference_does():
    with pytest.raises(ValueError, match="weight: expected dtype float32 or float16 or bfloat16, got float64"):
        add_rms_norm(torch.zeros(1, 1, 8).double(), None, torch.ones(8).double(), eps=0.0)
    with pytest.raises(ValueError, match=f"weight: expected at most {MOST_WIDTH} columns, got {MOST_WIDTH + 1}"):
        add_rms_norm(torch.zeros(1, 0, MOST_WIDTH + 1), None, torch.ones(MOST_WIDTH + 1), eps=0.0)
    with pytest.raises(ValueError, match="weight: expected a tensor that needs no gradient"):
        add_rms_norm(torch.zeros(1, 1, 8), None, torch.ones(8).requires_grad_(), eps=0.0)
    with pytest.raises(ValueError, match="gate_up: expected a tensor that needs no gradient"):
        gated_silu(torch.zeros(1, 1, 8).requires_grad_())
    with pytest.raises(ValueError, match="qkv: expected a tensor that needs no gradient"):
        rotary_write_kv(**rotary_case() | {"qkv": torch.zeros(2, 3, 24).requires_grad_()})


# Rotation and cache.


def rotary_case(batch=2, rows=3, heads=2, kv_heads=1, head_dim=6, capacity=9, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    angles = 3 * normal(11, head_dim // 2, seed=seed + 3)
    return {
        "qkv": normal(batch, rows, (heads + 2 * kv_heads) * head_dim, seed=seed, dtype=dtype),
        "cos": 1.5 * angles.cos(),
        "sin": 1.5 * angles.sin(),
        "positions": torch.randint(0, 11, (batch, rows), generator=generator, dtype=torch.int32),
        "k_cache": normal(batch, kv_heads, capacity, head_dim, seed=seed + 1, dtype=dtype),
        "v_cache": normal(batch, kv_heads, capacity, head_dim, seed=seed + 2, dtype=dtype),
        "kv_len": torch.randint(0, capacity + 1, (batch,), generator=generator, dtype=torch.int32),
    }


@st.composite
def rotations(draw):
    kv_heads, capacity = draw(st.integers(1, 2)), draw(st.sampled_from([1, 20, 40]))
    return rotary_case(
        draw(st.integers(1, 2)),
        draw(st.sampled_from([0, 1, 2, 16, 17])),
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        draw(st.sampled_from([2, 6, 32, 72])),
        capacity,
        draw(DTYPES),
        draw(st.integers(0, 9)),
    )


def exact_rotation(qkv, cos, sin, positions, k_cache, v_cache, kv_len):
    """By complex numbers, row by row; the queries and both caches in float64."""
    k_cache, v_cache = k_cache.double().clone(), v_cache.double().clone()
    (_, kv_heads, capacity, head_dim), half = k_cache.shape, k_cache.shape[3] // 2
    heads = qkv.double().unflatten(2, (-1, head_dim))
    turn = torch.complex(cos.double(), sin.double())[positions.long()].unsqueeze(2)
    turned = torch.complex(heads[..., :half].contiguous(), heads[..., half:].contiguous()) * turn
    turned = torch.cat([turned.real, turned.imag], dim=-1)
    for i_b, start in enumerate(kv_len.tolist()):
        for i in range(min(qkv.shape[1], capacity - start)):
            k_cache[i_b, :, start + i] = turned[i_b, i, -2 * kv_heads : -kv_heads]
            v_cache[i_b, :, start + i] = heads[i_b, i, -kv_heads:]
    return [turned[:, :, : -2 * kv_heads], k_cache, v_cache]


def run_rotation(case, device):
    case = moved(case, device)
    case = case | {name: case[name].clone() for name in ("k_cache", "v_cache")}
    q = rotary_write_kv(**case)
    return [q, case["k_cache"], case["v_cache"]]


@settings(max_examples=25, deadline=None)
@given(case=rotations())
def test_rotary_kernel(device, case):
    if case["qkv"].numel():
        with launched(_rotary_write_kv_kernel):
            got = run_rotation(case, device)
    else:
        got = run_rotation(case, device)
    exact = exact_rotation(**case)
    assert_close(got, exact, [one.to(case["qkv"].dtype) for one in exact])
    assert torch.equal(got[2].cpu(), exact[2].to(case["qkv"].dtype)), "values are moved, not computed"


@settings(max_examples=60, deadline=None)
@given(case=rotations())
def test_rotary_reference(case):
    exact = exact_rotation(**case)
    assert_close(run_rotation(case, "cpu"), exact, [one.to(case["qkv"].dtype) for one in exact])


def test_rotary_kernel_takes_strided_tensors(device):
    case = rotary_case(head_dim=32)
    exact = exact_rotation(**case)
    wide = torch.zeros(3, 2, 200, device=device)
    wide[:, :, 8:136] = case["qkv"].transpose(0, 1)
    caches = torch.zeros(2, 9, 1, 2, 40, device=device)
    case = moved(case, device)
    k_cache, v_cache = (caches[:, :, :, i, :32].transpose(1, 2) for i in range(2))
    k_cache.copy_(case["k_cache"])
    v_cache.copy_(case["v_cache"])
    strided = {"qkv": wide[:, :, 8:136].transpose(0, 1), "k_cache": k_cache, "v_cache": v_cache}
    with launched(_rotary_write_kv_kernel):
        q = rotary_write_kv(**case | strided)
    assert_close([q, k_cache, v_cache], exact, [one.float() for one in exact])


@pytest.mark.parametrize(("length", "position"), [(-40, 0), (99, 5), (2**31 - 1, 2**31 - 1), (3, -7), (3, 11)])
def test_rotary_kernel_stays_inside_whatever_comes(device, length, position):
    """Straight to the launcher, as on a GPU, where values are not looked at; tables and slab stand between NaN."""
    case = rotary_case(batch=1, rows=20, head_dim=32)
    case["kv_len"] = torch.tensor([length], dtype=torch.int32)
    case["positions"] = torch.full((1, 20), position, dtype=torch.int32)
    case = moved(case, device)
    for name in ("cos", "sin"):
        fenced = torch.full((13, 16), torch.nan, device=device)
        fenced[1:12] = case[name]
        case[name] = fenced[1:12]
    fenced = torch.zeros(4, 1, 1, 9, 32, device=device)
    case["k_cache"], case["v_cache"] = fenced[1], fenced[2]
    q = launch_rotary_write_kv(**case)
    nearest = min(max(position, 0), 10)
    assert torch.equal(q, launch_rotary_write_kv(**case | {"positions": torch.full_like(case["positions"], nearest)}))
    assert not q.isnan().any()
    assert not fenced[0].any()
    assert not fenced[3].any()
    assert bool(fenced[1:3].any()) == (length == 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotation_is_that_of_hugging_face(dtype):
    case = rotary_case(rows=7, heads=4, kv_heads=2, head_dim=32, capacity=20, dtype=dtype)
    case["kv_len"] = torch.tensor([2, 9], dtype=torch.int32)
    heads = case["qkv"].unflatten(2, (-1, 32)).transpose(1, 2)
    cos, sin = (torch.cat([case[name]] * 2, dim=-1)[case["positions"].long()] for name in ("cos", "sin"))
    q, k = apply_rotary_pos_emb(heads[:, :4].float(), heads[:, 4:6].float(), cos, sin)
    got, k_cache, v_cache = run_rotation(case, "cpu")
    options = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    torch.testing.assert_close(got.transpose(1, 2), q.to(dtype), **options)
    for row, start in enumerate((2, 9)):
        torch.testing.assert_close(k_cache[row, :, start : start + 7], k[row].to(dtype), **options)
        assert torch.equal(v_cache[row, :, start : start + 7], heads[row, 6:])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qkv": torch.zeros(2, 24)}, r"qkv: expected shape \[B, T, heads \* D\], got \[2, 24\]"),
        ({"qkv": torch.zeros(2, 3, 24).half()}, "k_cache: expected dtype float16, got float32"),
        ({"qkv": torch.zeros(2, 3, 12)}, "qkv: expected heads of 6, 1 of keys, 1 of values and more .*, got 12"),
        ({"qkv": torch.zeros(2, 3, 25)}, "qkv: expected heads of 6, .*, got 25"),
        ({"qkv": torch.zeros(2, 24, 3).mT}, "qkv: expected a contiguous last axis"),
        ({"cos": torch.zeros(11, 6)}, r"cos: expected shape \[P, 3\], got \[11, 6\]"),
        ({"cos": torch.zeros(11, 3).half()}, "cos: expected dtype float32, got float16"),
        ({"cos": torch.zeros(0, 3), "sin": torch.zeros(0, 3)}, "cos: expected a row for at least one position"),
        ({"sin": torch.zeros(10, 3)}, r"sin: expected shape \[11, 3\], got \[10, 3\]"),
        ({"positions": torch.zeros(2, 3).long()}, "positions: expected dtype int32, got int64"),
        ({"positions": torch.full((2, 3), 11, dtype=torch.int32)}, r"positions: expected values in \[0, 11\), got"),
        ({"k_cache": torch.zeros(2, 1, 9, 5)}, r"v_cache: expected shape \[2, 1, 9, 5\], got \[2, 1, 9, 6\]"),
        ({name: torch.zeros(2, 1, 9, 3) for name in ("k_cache", "v_cache")}, "k_cache: expected an even head size"),
        ({"k_cache": torch.zeros(2, 1, 6, 9).mT}, "k_cache: expected a contiguous last axis"),
        ({"v_cache": torch.zeros(2, 1, 6, 9).mT}, "v_cache: expected a contiguous last axis"),
        ({"kv_len": torch.zeros(1, dtype=torch.int32)}, r"kv_len: expected shape \[2\], got \[1\]"),
        ({"kv_len": torch.tensor([0, 10], dtype=torch.int32)}, r"kv_len: expected values in \[0, 10\), got \[0, 10\]"),
    ],
)
def test_rotary_write_kv_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        rotary_write_kv(**rotary_case() | changed)


# Gated activation.


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 2),
    rows=st.integers(0, 3),
    width=st.sampled_from([1, 7, 200, GATED_COLUMNS, GATED_COLUMNS + 3]),
    dtype=DTYPES,
    seed=st.integers(0, 9),
)
def test_gated_kernel(device, batch, rows, width, dtype, seed):
    gate_up = 4 * normal(batch, rows, 2 * width, seed=seed, dtype=dtype)
    if rows:
        with launched(_gated_silu_kernel):
            got = gated_silu(gate_up.to(device))
    else:
        got = gated_silu(gate_up.to(device))
    exact = silu(gate_up[..., :width].double()) * gate_up[..., width:].double()
    assert_close([got], [exact], [exact.to(dtype)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gated_reference(dtype):
    gate_up = 4 * normal(2, 3, 14, dtype=dtype)
    exact = silu(gate_up[..., :7].double()) * gate_up[..., 7:].double()
    got = reference.gated_silu(gate_up)
    assert_close([got], [exact], [exact.to(dtype)])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gated_kernel_at_its_ends(device):
    """A gate that overflows its exponential is 0 or passes through, and no NaN."""
    gate = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4])
    with launched(_gated_silu_kernel):
        got = gated_silu(torch.cat([gate, torch.full((5,), 2.0)])[None, None].to(device))
    assert got[0, 0].tolist() == [0.0, 0.0, 0.0, 400.0, 2e4]


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (torch.zeros(2, 8), r"gate_up: expected shape \[B, T, 2 \* I\], got \[2, 8\]"),
        (torch.zeros(1, 2, 8).int(), "gate_up: expected dtype float32 .*, got int32"),
        (torch.zeros(1, 2, 7), "gate_up: expected an even number of columns, got 7"),
        (torch.zeros(1, 2, 8).to("meta"), "gate_up: expected a tensor on a cuda or cpu device, got"),
    ],
)
def test_gated_silu_refuses(gate_up, message):
    with pytest.raises(ValueError, match=message):
        gated_silu(gate_up)


@pytest.mark.gpu
def test_decoder_kernels_never_wait_for_the_host():
    case = moved(rotary_case(head_dim=64, dtype=torch.bfloat16), "cuda")
    x, weight = normal(1, 3, 64, dtype=torch.bfloat16).cuda(), torch.ones(64, dtype=torch.bfloat16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        rotary_write_kv(**case)
        add_rms_norm(x, x, weight, eps=1e-5)
        gated_silu(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
