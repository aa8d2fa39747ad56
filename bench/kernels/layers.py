"""What a decoder's layer does with the few rows of a tree, against a matrix library and plain torch."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

import specvlm_kernels
from bench.floors import MODELS, Sizes
from bench.kernels.registry import Call, Case, Place, Problem, require_close
from specvlm_kernels import reference
from specvlm_kernels.fp8 import quantize_rows

ROWS, MANY_ROWS, EPS, CAPACITY = (1, 8, 64), 64, 1e-5, 256

#: Parts that a norm adds up, as many as a 7B layer's products are cut into.
PARTS = 4

CACHES = ("k_cache", "v_cache")

Arguments = dict[str, Any]


def plain_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    total = (residual + x.sum(0)).to(weight.dtype)
    return F.rms_norm(total, weight.shape, weight, eps), total


def plain_gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def plain_gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return plain_gate(F.linear(x, weight))


def plain_rotary(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> torch.Tensor:
    """As Hugging Face's Llama does it, and its static cache; of what `once_a_forward` makes."""
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.unflatten(2, (-1, head_dim)).transpose(1, 2)
    turning, values = heads[:, :-kv_heads], heads[:, -kv_heads:]
    low, high = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-high, low], -1) * sin
    k_cache.index_copy_(2, slots, turned[:, -kv_heads:])
    v_cache.index_copy_(2, slots, values)
    return turned[:, :-kv_heads].transpose(1, 2)


def once_a_forward(given: Arguments) -> Arguments:
    """The arguments with what Hugging Face makes of some once for all layers."""
    if "positions" not in given:
        return given
    positions, dtype = given["positions"].long(), given["k_cache"].dtype
    made = {name: torch.cat([given[name][positions]] * 2, -1)[:, None].to(dtype) for name in ("cos", "sin")}
    made["slots"] = given["kv_len"] + torch.arange(positions.shape[1], device=positions.device)
    return {name: value for name, value in given.items() if name not in ("positions", "kv_len")} | made


def plain_rotary_linear(x: torch.Tensor, weight: torch.Tensor, bias: None, **rotary: torch.Tensor) -> torch.Tensor:
    return plain_rotary(F.linear(x, weight, bias), **rotary)


PLAIN: dict[str, Callable[..., Any]] = {
    "add_rms_norm": plain_norm,
    "linear": F.linear,
    "linear_parts": F.linear,
    "gated_linear": plain_gated_linear,
    "gated_silu": plain_gate,
    "rotary_linear": plain_rotary_linear,
    "rotary_write_kv": plain_rotary,
}


def layer_cases() -> Iterator[Case]:
    """Every product of a 7B layer for 1, 8 and 64 rows, of e4m3 weights too, and what is between them; of a 13B layer
    for 64."""
    for sizes in MODELS:
        for rows in ROWS if sizes is MODELS[0] else (MANY_ROWS,):
            yield from product_cases(sizes, rows)
    for rows in ROWS:
        yield from product_cases(MODELS[0], rows, e4m3=True)
    yield from between_cases(MODELS[0], MANY_ROWS)


def product_cases(sizes: Sizes, rows: int, *, e4m3: bool = False) -> Iterator[Case]:
    wide = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    for op, what, columns, outputs, written in (
        ("rotary_linear", "q k v", sizes.hidden, wide, 2 * wide),
        ("linear_parts", "out", sizes.heads * sizes.head_dim, sizes.hidden, 4 * sizes.hidden),
        ("gated_linear", "gate and up", sizes.hidden, 2 * sizes.inner, 2 * sizes.inner),
        ("linear_parts", "down", sizes.inner, sizes.hidden, 4 * sizes.hidden),
        ("linear", "head", sizes.hidden, sizes.vocabulary, 2 * sizes.vocabulary),
    ):
        yield product_case(op, what, sizes, rows, columns, outputs, written, e4m3=e4m3)


def product_case(
    op: str, what: str, sizes: Sizes, rows: int, columns: int, outputs: int, written: int, *, e4m3: bool = False
) -> Case:
    """A product with a weight [outputs, columns], which writes `written` bytes a row; parts count as their sum.

    Of e4m3, the weight has a scale a row.
    """

    def arguments(place: Place) -> Arguments:
        given: Arguments = {"x": place.randn(1, rows, columns), "weight": place.randn(outputs, columns) / columns**0.5}
        if e4m3:
            given["weight"], given["weight_scale"] = quantize_rows(given["weight"])
        return given | ({"bias": None} | rotary(place, sizes, rows) if op == "rotary_linear" else {})

    size = outputs * (columns + 4) if e4m3 else 2 * outputs * columns
    compiled = sizes is MODELS[0] and rows == MANY_ROWS and not e4m3
    return Case(
        op,
        f"{sizes.name}, {what}, {'e4m3 weight, ' if e4m3 else ''}{rows} row{'s' * (rows > 1)}",
        size + rows * (2 * columns + written),
        lambda place: problem(place, op, arguments, size, compiled=compiled),
        flops=2 * rows * outputs * columns,
        facts={"rows": rows, "bits": 8 if e4m3 else 16},
    )


def between_cases(sizes: Sizes, rows: int) -> Iterator[Case]:
    width = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim

    def normed(place: Place) -> Arguments:
        return {
            # Small, so that eps has a say.
            "x": place.randn(PARTS, 1, rows, sizes.hidden, dtype=torch.float32) / 500,
            "residual": place.randn(1, rows, sizes.hidden) / 500,
            "weight": 1 + place.randn(sizes.hidden) / 10,
            "eps": EPS,
        }

    def turned(place: Place) -> Arguments:
        return {"qkv": place.randn(1, rows, width)} | rotary(place, sizes, rows)

    def gated(place: Place) -> Arguments:
        return {"gate_up": place.randn(1, rows, 2 * sizes.inner)}

    for op, arguments, size in (
        ("add_rms_norm", normed, (4 * PARTS + 6) * rows * sizes.hidden),
        ("rotary_write_kv", turned, 4 * rows * width),
        ("gated_silu", gated, 6 * rows * sizes.inner),
    ):
        yield Case(
            op, f"{sizes.name}, {rows} row{'s' * (rows > 1)}", size, _between(op, arguments, size), facts={"rows": rows}
        )


def _between(op: str, arguments: Callable[[Place], Arguments], size: int) -> Callable[[Place], Problem]:
    return lambda place: problem(place, op, arguments, size, compiled=True)


def rotary(place: Place, sizes: Sizes, rows: int) -> Arguments:
    """Tables, positions and a cache for a tree behind half of it."""
    slots, pairs = (torch.arange(size, device=place.device) for size in (CAPACITY, sizes.head_dim // 2))
    angles = slots[:, None] * 0.9**pairs
    caches = place.randn(2, 1, sizes.kv_heads, CAPACITY, sizes.head_dim)
    return {
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": place.int32([[CAPACITY // 2 + i for i in range(rows)]]),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "kv_len": place.int32([CAPACITY // 2]),
    }


def problem(place: Place, op: str, arguments: Callable[[Place], Arguments], size: int, *, compiled: bool) -> Problem:
    turns = place.turns(size)
    given = [arguments(place) for _ in range(turns)]
    plainly = [once_a_forward(_read(each, torch.bfloat16)) for each in given]

    def check() -> None:
        exact = {name: _in_double(name, value) for name, value in _read(given[0], torch.float64).items()}
        found = outcome(op, specvlm_kernels, given[0]), outcome(op, None, plainly[0]), outcome(op, reference, exact)
        for ours, usual, true in zip(*found, strict=True):
            require_close(op, ours, usual, true)

    def fast() -> Call:
        call: Any = place.compiled(PLAIN[op], dynamic=False)
        return lambda turn: call(**plainly[turn])

    return Problem(
        check,
        lambda turn: getattr(specvlm_kernels, op)(**given[turn]),
        turns,
        {"torch": lambda: lambda turn: PLAIN[op](**plainly[turn])},
        {"torch.compile": fast} if compiled else {},
    )


def outcome(op: str, module: ModuleType | None, given: Arguments) -> list[torch.Tensor]:
    """What a module's op (None: plain torch) returns, parts summed, and what it leaves in copies of the caches."""
    given = given | {name: given[name].clone() for name in CACHES if name in given}
    returned = (getattr(module, op) if module else PLAIN[op])(**given)
    if op == "linear_parts" and module:
        returned = returned.sum(0).to(given["x"].dtype)
    results = [returned] if isinstance(returned, torch.Tensor) else list(returned)
    return results + [given[name] for name in CACHES if name in given]


def _read(given: Arguments, dtype: torch.dtype) -> Arguments:
    """The arguments, an e4m3 weight as the numbers it stands for in `dtype`: a matrix library takes no such weight."""
    if "weight_scale" not in given:
        return given
    weight = (given["weight"].to(dtype) * given["weight_scale"].to(dtype)[:, None]).contiguous()
    return {name: value for name, value in given.items() if name != "weight_scale"} | {"weight": weight}


def _in_double(name: str, value: Any) -> Any:
    """A float tensor in fp64; tables of cosines and sines stay in fp32, which every op takes them in."""
    floats = isinstance(value, torch.Tensor) and value.is_floating_point() and name not in ("cos", "sin")
    return value.double() if floats else value
