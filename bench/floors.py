"""What a step of the own decoder and a level of an EAGLE draft cannot help: launches, bytes, and the time these take.

    python -m bench.floors

Computed from a model's sizes, and measured nowhere. The last line is JSON.
"""

import json
from dataclasses import asdict, dataclass

#: What a layer launches for a tree, in order: the kernel, and what it does.
LAUNCHES = (
    ("_add_rms_norm_kernel", "adds the last layer's sum to the stream, norms it"),
    ("_rotary_linear_kernel", "q, k and v, rotated, k and v into the cache"),
    ("_tree_attention_kernel", "attention, by splits of the cache"),
    ("_tree_attention_merge_kernel", "weighs the splits"),
    ("_linear_kernel", "attention's output, in parts"),
    ("_add_rms_norm_kernel", "adds the parts to the stream, norms it"),
    ("_gated_linear_kernel", "gate and up, activated"),
    ("_linear_kernel", "down, in parts"),
)

#: What the head launches for a level's nodes, without a norm in front: their choice, and growing the tree, come on top.
LEVEL_LAUNCHES = (
    ("cat", "embedding beside feature"),
    ("_linear_kernel", "fc"),
    *LAUNCHES[1:],
    ("_add_rms_norm_kernel", "adds the layer's sum to the stream"),
    ("_linear_kernel", "the output head"),
)

#: Tokens that a reduced output head proposes, FR-Spec's 8k.
REDUCED = 8192

#: Bytes a second that an H200 copies with, as stated for it; a measured figure belongs to the machine it is from.
COPY_BANDWIDTH = 4.3e12


@dataclass(frozen=True, slots=True)
class Sizes:
    """A language model's sizes."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 128


MODELS = (
    Sizes("LLaVA-1.5-7B", 4096, 11008, 32, 32, 32, 32064),
    Sizes("LLaVA-1.5-13B", 5120, 13824, 40, 40, 40, 32064),
)
CONTEXT = 640


@dataclass(frozen=True, slots=True)
class Floor:
    """Bytes that one step reads, of 2-byte values, and how long a copy of them takes.

    Attributes:
        weights: of a layer.
        kv: of a layer, at `CONTEXT` stored tokens.
        head: of the output head and the last norm.
        milliseconds: for all layers and the head.
    """

    model: str
    launches: int
    weights: int
    kv: int
    head: int
    milliseconds: float


def layer_weights(sizes: Sizes, itemsize: int = 2) -> int:
    """Bytes of one layer's weights, biases left out."""
    attention = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim + sizes.heads * sizes.head_dim
    return itemsize * sizes.hidden * (attention + 3 * sizes.inner + 2)


def layer_kv(sizes: Sizes, context: int, itemsize: int = 2) -> int:
    """Bytes of one layer's keys and values of `context` stored tokens."""
    return 2 * itemsize * sizes.kv_heads * sizes.head_dim * context


def head_weights(sizes: Sizes, itemsize: int = 2) -> int:
    """Bytes of the output head and the last norm."""
    return itemsize * sizes.hidden * (sizes.vocabulary + 1)


def step_bytes(sizes: Sizes, context: int, itemsize: int = 2) -> int:
    """Bytes that one step reads, behind `context` stored tokens."""
    layer = layer_weights(sizes, itemsize) + layer_kv(sizes, context, itemsize)
    return sizes.layers * layer + head_weights(sizes, itemsize)


def floor_of(sizes: Sizes, context: int = CONTEXT) -> Floor:
    """What a step of a model cannot help."""
    milliseconds = step_bytes(sizes, context) / COPY_BANDWIDTH * 1e3
    parts = layer_weights(sizes), layer_kv(sizes, context), head_weights(sizes)
    return Floor(sizes.name, len(LAUNCHES), *parts, milliseconds)


@dataclass(frozen=True, slots=True)
class LevelFloor:
    """Bytes that one level of an EAGLE draft reads, and how long a copy of them takes.

    Attributes:
        output: how many tokens it proposes, and in what its weights are.
        fc, layer, head: of the weights, with their biases, norms and scales.
        kv: of its layer, at `CONTEXT` stored tokens.
    """

    model: str
    output: str
    launches: int
    fc: int
    layer: int
    head: int
    kv: int
    milliseconds: float


def level_of(
    sizes: Sizes, proposed: int | None = None, *, e4m3: bool = False, itemsize: int = 2, context: int = CONTEXT
) -> LevelFloor:
    """What a level of an EAGLE draft for a model cannot help.

    Args:
        proposed: rows of a reduced output head; None: the target's own.
        e4m3: the weights are of 8 bits, with a scale of 4 bytes a row.
        itemsize: bytes of any other number.
    """

    def matrix(rows: int, columns: int) -> int:
        return rows * (columns + 4) if e4m3 else itemsize * rows * columns

    hidden, heads = sizes.hidden, sizes.heads * sizes.head_dim
    rows = sizes.vocabulary if proposed is None else proposed
    fc = matrix(hidden, 2 * hidden) + itemsize * hidden
    layer = (
        matrix(heads + 2 * sizes.kv_heads * sizes.head_dim, hidden)
        + matrix(hidden, heads)
        + matrix(2 * sizes.inner, hidden)
        + matrix(hidden, sizes.inner)
        + itemsize * hidden
    )
    head, kv = matrix(rows, hidden), 2 * itemsize * sizes.kv_heads * sizes.head_dim * context
    output = f"{rows} tokens, {'e4m3' if e4m3 else 'bf16'}"
    time = (fc + layer + head + kv) / COPY_BANDWIDTH * 1e3
    return LevelFloor(sizes.name, output, len(LEVEL_LAUNCHES), fc, layer, head, kv, time)


def levels_of(sizes: Sizes) -> list[LevelFloor]:
    """Whole and reduced output head, in bf16 and e4m3."""
    return [level_of(sizes, rows, e4m3=e4m3) for e4m3 in (False, True) for rows in (None, REDUCED)]


def main() -> None:
    """Prints the launches and the floors."""
    print(f"Computed, not measured: bf16, {CONTEXT} stored tokens, {COPY_BANDWIDTH / 1e12:g} TB/s.\n")
    _print_launches("layer", LAUNCHES)
    columns = ("model", "launches a layer", "weights a layer", "KV a layer", "head", "floor of a step")
    print(f"\n| {' | '.join(columns)} |\n|---|{'--:|' * (len(columns) - 1)}")
    floors = [floor_of(sizes) for sizes in MODELS]
    for one in floors:
        mib = (f"{size / 2**20:.1f} MiB" for size in (one.weights, one.kv, one.head))
        print(f"| {one.model} | {one.launches} | {' | '.join(mib)} | {one.milliseconds:.2f} ms |")
    print()
    _print_launches("EAGLE level", LEVEL_LAUNCHES)
    columns = ("model", "an EAGLE level proposes", "launches", "fc", "layer", "head", "KV", "floor of a level")
    print(f"\n| {' | '.join(columns)} |\n|---|---|{'--:|' * (len(columns) - 2)}")
    levels = [level for sizes in MODELS for level in levels_of(sizes)]
    for each in levels:
        mib = (f"{size / 2**20:.1f} MiB" for size in (each.fc, each.layer, each.head, each.kv))
        print(
            f"| {each.model} | {each.output} | {each.launches} | {' | '.join(mib)} | {1e3 * each.milliseconds:.0f} µs |"
        )
    computed = {"floors": [asdict(one) for one in floors], "levels": [asdict(one) for one in levels]}
    print(json.dumps({"kind": "computed", "bandwidth": COPY_BANDWIDTH, **computed}))


def _print_launches(what: str, launches: tuple[tuple[str, str], ...]) -> None:
    print(f"| launch of a{'n' * (what[0] in 'aeiouE')} {what} | kernel | what it does |\n|--:|---|---|")
    for number, (kernel, does) in enumerate(launches, 1):
        print(f"| {number} | `{kernel}` | {does} |")


if __name__ == "__main__":
    main()
