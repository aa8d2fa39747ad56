"""Rotation of queries and keys and their way into the cache: against Hugging Face's Llama and float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specvlm_kernels import rotary_linear, rotary_write_kv, write_kv
from specvlm_kernels.decoder_linear import LinearConfig
from specvlm_kernels.fp8 import FP8
from specvlm_kernels.rotary import (
    _rotary_linear_kernel,
    _rotary_write_kv_kernel,
    launch_rotary_linear,
    launch_rotary_write_kv,
)
from tests.kernels.test_decoder_linear import INTERPRETED_DTYPES, exact_product, product_case
from tests.kernels.tokens import assert_close, moved, normal
from tests.kernels.watch import launched

EIGHT_BITS = {name: torch.zeros(2, 1, 9, 6).to(FP8) for name in ("k_cache", "v_cache")} | {
    name: torch.ones(1) for name in ("k_scale", "v_scale")
}
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


# Of what a product left.


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
        ({"qkv": torch.zeros(2, 3, 24).half()}, "k_cache: expected dtype float16 or float8_e4m3fn, got float32"),
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
        ({"k_scale": torch.ones(1)}, "k_scale: expected None, since the cache is float32 and not float8_e4m3fn"),
        (EIGHT_BITS | {"v_scale": None}, r"v_scale: expected a \[1\] or \[2, 1\] tensor for a float8_e4m3fn cache"),
        (EIGHT_BITS | {"v_cache": torch.zeros(2, 1, 9, 6)}, "v_cache: expected dtype float8_e4m3fn, got float32"),
        (EIGHT_BITS | {"qkv": torch.zeros(2, 3, 24).double()}, "qkv: expected dtype float32 .*, got float64"),
        ({name: torch.zeros(2, 0, 9, 6) for name in ("k_cache", "v_cache")}, "k_cache: expected at least one head"),
        ({"kv_len": torch.zeros(1, dtype=torch.int32)}, r"kv_len: expected shape \[2\], got \[1\]"),
        ({"kv_len": torch.tensor([0, 10], dtype=torch.int32)}, r"kv_len: expected values in \[0, 10\), got \[0, 10\]"),
    ],
)
def test_rotary_write_kv_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        rotary_write_kv(**rotary_case() | changed)


@pytest.mark.interpreter
def test_the_kernel_refuses_what_only_the_reference_does():
    with pytest.raises(ValueError, match="qkv: expected a tensor that needs no gradient"):
        rotary_write_kv(**rotary_case() | {"qkv": torch.zeros(2, 3, 24).requires_grad_()})


# With the product in the same launch.


@st.composite
def rotary_products(draw):
    kv_heads, head_dim = draw(st.integers(1, 2)), draw(st.sampled_from([2, 6, 72]))
    batch, rows = draw(st.integers(1, 2)), draw(st.sampled_from([0, 1, 17, 33]))
    heads, dtype = kv_heads * draw(st.integers(1, 2)), draw(st.sampled_from(INTERPRETED_DTYPES))
    case = rotary_case(batch, rows, heads, kv_heads, head_dim, draw(st.sampled_from([1, 20, 40])), dtype)
    width = case.pop("qkv").shape[2]
    bias, columns = draw(st.booleans()), draw(st.sampled_from([3, 64, 100]))
    return case | {"bias": None} | product_case(rows, columns, width, batch=batch, dtype=dtype, bias=bias)


def check_rotary_linear(case, device):
    rotation = {name: one for name, one in case.items() if name not in ("x", "weight", "bias")}
    exact = exact_rotation(exact_product(case["x"], case["weight"], case["bias"]), **rotation)
    given = moved(case, device)
    given |= {name: given[name].clone() for name in ("k_cache", "v_cache")}
    q = rotary_linear(**given)
    assert_close([q, given["k_cache"], given["v_cache"]], exact, [one.to(case["x"].dtype) for one in exact])


@settings(max_examples=12, deadline=None)
@given(case=rotary_products())
def test_rotary_linear_kernel(device, case):
    if case["x"].numel():
        with launched(_rotary_linear_kernel):
            check_rotary_linear(case, device)
    else:
        check_rotary_linear(case, device)


@settings(max_examples=40, deadline=None)
@given(case=rotary_products())
def test_rotary_linear_reference(case):
    if case["x"].dtype == torch.float32:  # in fp16 the product is rounded before it is turned
        check_rotary_linear(case, "cpu")


def test_a_row_does_not_hang_on_its_company(device):
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    rotary = moved(rotary_case(1, 70, 2, 1, 32, 100, dtype), device)
    rotary.pop("qkv")
    rotary["kv_len"].zero_()
    x, weight = moved(product_case(70, 200, 128, dtype=dtype, bias=False), device).values()
    firsts = []
    with launched(_rotary_linear_kernel):
        for rows in (1, 2, 64, 70):
            turning = rotary | {"positions": rotary["positions"][:, :rows]}
            firsts.append(rotary_linear(x[:, :rows], weight, None, **turning)[:, :1].clone())
    for first in firsts[1:]:
        assert torch.equal(first, firsts[0])


@pytest.mark.parametrize(("length", "position"), [(-40, 0), (99, 5), (2**31 - 1, 2**31 - 1), (3, -7)])
def test_rotary_linear_kernel_stays_inside_whatever_comes(device, length, position):
    """Straight to the launcher, as on a GPU, where values are not looked at."""
    case = rotary_case(batch=1, rows=20, head_dim=32)
    width = case.pop("qkv").shape[2]
    case |= product_case(20, 16, width, bias=False) | {"bias": None}
    case["kv_len"] = torch.tensor([length], dtype=torch.int32)
    case["positions"] = torch.full((1, 20), position, dtype=torch.int32)
    case = moved(case, device)
    fenced = torch.zeros(4, 1, 1, 9, 32, device=device)
    case["k_cache"], case["v_cache"] = fenced[1], fenced[2]
    q = launch_rotary_linear(**case, config=LinearConfig(16, 16, 32))
    assert not q.isnan().any()
    assert not fenced[0].any()
    assert not fenced[3].any()
    assert bool(fenced[1:3].any()) == (length == 3)


def test_rotary_linear_refuses_what_rotary_write_kv_does():
    case = rotary_case()
    case.pop("qkv")
    case |= product_case(3, 8, 24, batch=2)
    with pytest.raises(ValueError, match=r"weight: expected heads of 6, .*, got 13 numbers"):
        rotary_linear(**case | {"weight": torch.zeros(13, 8), "bias": None})
    with pytest.raises(ValueError, match="positions: expected dtype int32, got int64"):
        rotary_linear(**case | {"positions": case["positions"].long()})


# Into a cache of 8 bits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("op", [rotary_write_kv, rotary_linear])
def test_a_cache_of_8_bits_is_given_what_write_kv_makes_of_keys_and_values(device, op, shared, dtype):
    case = moved(rotary_case(batch=2, rows=20, heads=4, kv_heads=2, head_dim=32, capacity=40, dtype=dtype), device)
    if op is rotary_linear:
        width = case.pop("qkv").shape[2]
        case |= moved(product_case(20, 24, width, batch=2, dtype=dtype), device)
    case["kv_len"] = torch.tensor([7, 30], dtype=torch.int32, device=device)
    plain = case | {name: torch.zeros_like(case[name]) for name in ("k_cache", "v_cache")}
    q = op(**plain)
    scales = {name: (1 + normal(2, 4, seed=i).abs()) / 100 for i, name in enumerate(("k_scale", "v_scale"))}
    scales = {name: (scale[0] if shared else scale)[..., ::2] for name, scale in moved(scales, device).items()}
    got, expected = torch.zeros(2, 2, *plain["k_cache"].shape, device=device).to(FP8)
    empty = torch.zeros(2, dtype=torch.int32, device=device)
    write_kv(*expected, plain["k_cache"], plain["v_cache"], empty, **scales)
    assert torch.equal(op(**case | {"k_cache": got[0], "v_cache": got[1]}, **scales), q)
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    assert got.view(torch.uint8)[:, 0, :, 7:27].any()


def test_linear_kernel_takes_strided_tensors(device):
    rotary = rotary_case(rows=5, head_dim=32, capacity=20)
    width = rotary.pop("qkv").shape[2]
    expected = moved(product_case(5, 24, width, batch=2) | rotary, device)
    wide, caches = torch.zeros(width, 40, device=device), torch.zeros(2, 2, 20, 1, 32, device=device)
    wide[:, 8:32] = expected["weight"]
    k_cache, v_cache = caches.transpose(2, 3)
    k_cache.copy_(expected["k_cache"])
    v_cache.copy_(expected["v_cache"])
    strided = {
        "x": expected["x"].transpose(0, 1).contiguous().transpose(0, 1),
        "weight": wide[:, 8:32],
        "positions": expected["positions"].T.contiguous().T,
        "k_cache": k_cache,
        "v_cache": v_cache,
    }
    with launched(_rotary_linear_kernel):
        q = rotary_linear(**expected | strided)
    assert torch.equal(q, rotary_linear(**expected))
    assert torch.equal(k_cache, expected["k_cache"])
    assert torch.equal(v_cache, expected["v_cache"])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 128])
def test_linear_kernel_at_a_models_size_in_bf16(rows):
    rotary = rotary_case(1, rows, 32, 32, 128, 256, torch.bfloat16)
    width = rotary.pop("qkv").shape[2]
    rotary["kv_len"] = torch.tensor([100], dtype=torch.int32)
    case = moved(product_case(rows, 4096, width, dtype=torch.bfloat16, bias=False) | rotary, "cuda")
    rotary = {name: case[name] for name in rotary}
    exact = exact_rotation(exact_product(case["x"], case["weight"]), **rotary)
    plain = exact_rotation(case["x"] @ case["weight"].T, **rotary)
    q = rotary_linear(**case, bias=None)
    assert_close([q, case["k_cache"], case["v_cache"]], exact, [one.bfloat16() for one in plain])
