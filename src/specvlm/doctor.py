"""Whether this machine runs the kernels, and runs them right.

Each op is run once on a small problem and compared with its plain torch reference: on a GPU as compiled, without one
in Triton's interpreter. The interpreter is chosen when a process starts, hence a process of its own:
`python -m specvlm.doctor` prints the findings as JSON.
"""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Final

import torch
from torch import Tensor

import specvlm_kernels
from specvlm_kernels import reference

PACKAGES: Final = ("specvlm", "torch", "triton", "transformers", "numpy")

#: A kernel that agrees differs by rounding: of fp32 sums in another order, or of a bf16 result.
TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A small problem for one op.

    Attributes:
        op: its name in `specvlm_kernels`.
        arguments: makes the arguments, the same ones each time, on the CPU, floats in the dtype given.
        changed: arguments that the op changes in place.
        learned: arguments whose gradient the op gives; that of the result's sum is compared too.
    """

    op: str
    arguments: Callable[[torch.dtype], Arguments]
    changed: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """How an op did.

    Attributes:
        error: the largest difference from the reference; None: there was nothing to compare.
        problem: what is wrong; None: nothing.
    """

    op: str
    error: float | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything `specvlm doctor` has to say.

    Attributes:
        versions: by package; None: not installed.
        gpu: its name, memory and compute capability; None: there is none.
        how: how the kernels ran: "compiled" or "interpreted".
    """

    versions: dict[str, str | None]
    gpu: str | None
    how: str
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """No op has a problem."""
        return all(finding.problem is None for finding in self.findings)


def diagnose() -> Diagnosis:
    """Looks at this machine and runs every kernel: here on a GPU, in the interpreter without one."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        name = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        return Diagnosis(versions, name, "compiled", check_kernels(torch.device("cuda"), torch.bfloat16))
    return Diagnosis(versions, None, "interpreted", _interpreted())


def check_kernels(device: torch.device, dtype: torch.dtype) -> list[Finding]:
    """Runs every case on `device`, floats in `dtype`, against the reference on the CPU."""
    return [_check(case, device, dtype) for case in CASES]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _interpreted() -> list[Finding]:
    """The findings of a process that runs the kernels in Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "specvlm.doctor"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return [Finding(case.op, None, f"the interpreter's process failed: {reason}") for case in CASES]
    return [Finding(**finding) for finding in json.loads(done.stdout.splitlines()[-1])]


def _check(case: Case, device: torch.device, dtype: torch.dtype) -> Finding:
    try:
        results = [tensor.cpu() for tensor in _run(specvlm_kernels, case, dtype, device)]
        expected = _run(reference, case, dtype, torch.device("cpu"))
        largest = max(_difference(got, want) for got, want in zip(results, expected, strict=True))
    except Exception as error:  # whatever a compiler or an interpreter raises is the finding
        lines = str(error).strip().splitlines() or ["no message"]
        return Finding(case.op, None, f"{type(error).__name__}: {lines[0]}")
    problem = f"expected at most {TOLERANCE[dtype]:g} from the reference, got {largest:.3g}"
    return Finding(case.op, largest, None if largest <= TOLERANCE[dtype] else problem)


def _run(module: Any, case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """What the op of `module` returns, what it changed and the gradients it gives, as a flat list."""
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in case.arguments(dtype).items()
    }
    learned = [arguments[name].requires_grad_() for name in case.learned]
    returned = _tensors(getattr(module, case.op)(**arguments))
    changed = [arguments[name] for name in case.changed]
    return [*(tensor.detach() for tensor in returned), *changed, *_gradients(returned, learned)]


def _gradients(returned: list[Tensor], learned: list[Tensor]) -> list[Tensor]:
    """Of the sum of what an op returned; 0 where it gives none."""
    sums = [tensor.sum() for tensor in returned if tensor.requires_grad]
    return list(torch.autograd.grad(sums, learned)) if sums else [torch.zeros_like(tensor) for tensor in learned]


def _tensors(returned: Any) -> list[Tensor]:
    """A result's tensors: of one, of several, of a dataclass, or none."""
    if returned is None:
        return []
    if isinstance(returned, Tensor):
        return [returned]
    if is_dataclass(returned):
        return [getattr(returned, part.name) for part in fields(returned)]
    return list(returned)


def _difference(got: Tensor, want: Tensor) -> float:
    """The largest difference.

    Raises:
        ValueError: shape or dtype differ, or a difference is no number.
    """
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        raise ValueError(f"expected {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}")
    largest = float(torch.where(got == want, 0.0, (got.double() - want.double()).abs()).max())
    if not math.isfinite(largest):
        raise ValueError("expected numbers that can be compared, got infinities or NaN where the reference has none")
    return largest


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Two prompts with trees of 20 nodes behind 37 and 61 stored positions, vocabularies and heads of odd sizes.
_PARENTS = torch.tensor([[-1, *((i - 1) // 2 for i in range(1, 20))], list(range(-1, 19))], dtype=torch.int32)
_KV_LEN = torch.tensor([37, 61], dtype=torch.int32)
_POSITIONS = _KV_LEN[:, None] + torch.arange(20, dtype=torch.int32)
_SAMPLING: Arguments = {"temperature": 0.8, "seed": torch.tensor([3, 2**40 + 1])}
_FILTERS: Arguments = {"top_k": 50, "top_p": 0.9}


def _accept_arguments(dtype: torch.dtype) -> Arguments:
    """Half of the nodes are what their parents draw, so that there is a path to walk."""
    shared: Arguments = {"logits": _randn(2, 20, 1003, dtype=dtype), "positions": _POSITIONS} | _SAMPLING | _FILTERS
    drawn = reference.draw(**shared).gather(1, _PARENTS.clamp(min=0).long())
    tokens = torch.where(torch.arange(20) % 2 == 1, drawn, 1002 - drawn)
    return {"tokens": tokens, "parents": _PARENTS} | shared


def _unfiltered_arguments(dtype: torch.dtype) -> Arguments:
    """For the other rules: the search for a border, which `accept` has looked at, is slow in the interpreter."""
    return _accept_arguments(dtype) | {"top_k": 0, "top_p": 1.0}


def _ratio_arguments(dtype: torch.dtype) -> Arguments:
    return _unfiltered_arguments(dtype) | {"draft_logits": _randn(2, 20, 1003, dtype=dtype, seed=1)}


def _beam_arguments(dtype: torch.dtype) -> Arguments:
    """Many scores are equal: ties are the hard part."""
    return {
        "tokens": torch.arange(60).view(2, 30),
        "scores": _randn(2, 30).round(),
        "ancestors": torch.arange(6).view(2, 3, 1),
        "width": 7,
        "first_slot": 20,
    }


def _rerank_arguments(dtype: torch.dtype) -> Arguments:
    """Ten children of the root, ten each of five of them; the second prompt's fall less."""
    parents = torch.cat([torch.full((10,), -1), torch.arange(0, 10, 2).repeat_interleave(10)]).expand(2, -1)
    steps = _randn(2, 60).abs().round() * torch.tensor([[1.0], [0.5]])
    above = torch.cat([torch.zeros(2, 10), steps.gather(1, parents[:, 10:])], dim=1)
    return {
        "root": torch.tensor([7, 8]),
        "tokens": torch.arange(120).view(2, 60),
        "parents": parents,
        "scores": -steps - above,
        "depths": torch.cat([torch.full((10,), 1), torch.full((50,), 2)]).int(),
        "nodes": 20,
        "size": 20,
    }


def _attention_arguments(dtype: torch.dtype) -> Arguments:
    return {
        "q": _randn(2, 20, 6, 64, dtype=dtype),
        "k_cache": _randn(2, 3, 100, 64, dtype=dtype, seed=1),
        "v_cache": _randn(2, 3, 100, 64, dtype=dtype, seed=2),
        "kv_len": _KV_LEN,
        "ancestors": reference.pack_ancestors(_PARENTS),
    }


def _write_arguments(dtype: torch.dtype) -> Arguments:
    caches = {name: _randn(2, 3, 100, 64, dtype=dtype, seed=i) for i, name in enumerate(("k_cache", "v_cache"))}
    return (
        caches
        | {name: _randn(2, 3, 20, 64, dtype=dtype, seed=i) for i, name in enumerate("kv", 2)}
        | {"kv_len": _KV_LEN}
    )


def _rotary_arguments(dtype: torch.dtype) -> Arguments:
    caches = {name: _randn(2, 3, 100, 64, dtype=dtype, seed=i) for i, name in enumerate(("k_cache", "v_cache"))}
    angles = torch.arange(100)[:, None] * 0.5 ** torch.arange(32)
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    return (
        caches | tables | {"qkv": _randn(2, 20, 12 * 64, dtype=dtype), "positions": _POSITIONS.int(), "kv_len": _KV_LEN}
    )


def _linear_arguments(dtype: torch.dtype, rows: int) -> Arguments:
    """Results of about 1, so that a bf16 one's rounding is small."""
    return {"x": _randn(2, 20, 96, dtype=dtype), "weight": _randn(rows, 96, seed=1).div(16).to(dtype)}


def _rotary_linear_arguments(dtype: torch.dtype) -> Arguments:
    rotary = {name: value for name, value in _rotary_arguments(dtype).items() if name != "qkv"}
    return _linear_arguments(dtype, 12 * 64) | rotary | {"bias": _randn(12 * 64, seed=2).div(16).to(dtype)}


def _norm_arguments(dtype: torch.dtype) -> Arguments:
    return {
        "x": _randn(2, 20, 200, dtype=dtype),
        "residual": _randn(2, 20, 200, dtype=dtype, seed=1),
        "weight": _randn(200, seed=2).mul(0.1).add(0.5).to(dtype),
        "eps": 1e-5,
    }


def _compact_arguments(dtype: torch.dtype) -> Arguments:
    path = torch.full((2, 20), -1, dtype=torch.int32)
    path[0, :3], path[1, :2] = torch.tensor([2, 5, 11]), torch.tensor([1, 4])
    return {
        "cache": _randn(2, 2, 2, 3, 100, 64, dtype=dtype),
        "kv_len": _KV_LEN,
        "path": path,
        "length": torch.tensor([3, 2], dtype=torch.int32),
    }


def _loss_arguments(dtype: torch.dtype) -> Arguments:
    """Sharp enough that a bf16 gradient stands out."""
    return {
        "logits": 4 * _randn(20, 1003, dtype=dtype),
        "teacher_logits": 4 * _randn(20, 1003, dtype=dtype, seed=1),
    }


def _grid_arguments(dtype: torch.dtype) -> Arguments:
    """Two grids whose lower and right edges are ragged."""
    return {"x": _randn(2, 77, 40, dtype=dtype), "grid": (7, 11), "stride": 3}


def _conv_arguments(dtype: torch.dtype) -> Arguments:
    weights = {"weight": _randn(40, 4, 4, seed=1).div(8).to(dtype), "bias": _randn(40, dtype=dtype, seed=2)}
    return _grid_arguments(dtype) | weights


def _resample_arguments(dtype: torch.dtype) -> Arguments:
    weights = {name: _randn(60, 40, seed=i).div(8).to(dtype) for i, name in enumerate(("key_weight", "value_weight"))}
    return {"x": _randn(2, 77, 40, dtype=dtype), "queries": _randn(2, 3, 20, dtype=dtype, seed=3)} | weights


CASES: Final = (
    Case("pack_ancestors", lambda dtype: {"parents": _PARENTS}),
    Case("tree_attention", _attention_arguments),
    Case(
        "draw",
        lambda dtype: {"logits": _randn(2, 20, 1003, dtype=dtype), "positions": _POSITIONS} | _SAMPLING | _FILTERS,
    ),
    Case("accept", _accept_arguments),
    Case("accept_ratio", _ratio_arguments),
    Case("accept_typical", _unfiltered_arguments),
    Case("accept_within", lambda dtype: _unfiltered_arguments(dtype) | {"radius": 600, "ordinal": (3, 1000)}),
    Case(
        "draft_topk",
        lambda dtype: {"logits": _randn(2, 20, 1003, dtype=dtype), "k": 10, "positions": _POSITIONS} | _SAMPLING,
    ),
    Case("select_beam", _beam_arguments),
    Case("rerank_tree", _rerank_arguments),
    Case("soft_cross_entropy", _loss_arguments, learned=("logits",)),
    Case("total_variation", _loss_arguments, learned=("logits",)),
    Case("write_kv", _write_arguments, changed=("k_cache", "v_cache")),
    Case("compact_kv", _compact_arguments, changed=("cache",)),
    Case("add_rms_norm", _norm_arguments),
    Case("rotary_write_kv", _rotary_arguments, changed=("k_cache", "v_cache")),
    Case("linear", lambda dtype: _linear_arguments(dtype, 130) | {"bias": _randn(130, seed=2).div(16).to(dtype)}),
    Case("linear_parts", lambda dtype: _linear_arguments(dtype, 130)),
    Case("gated_linear", lambda dtype: _linear_arguments(dtype, 140)),
    Case("rotary_linear", _rotary_linear_arguments, changed=("k_cache", "v_cache")),
    Case("gated_silu", lambda dtype: {"gate_up": _randn(2, 20, 300).mul(0.5).to(dtype)}),
    Case("pool_tokens", _grid_arguments),
    Case("conv_tokens", _conv_arguments),
    Case(
        "prune_tokens",
        lambda dtype: {"x": _randn(2, 77, 40, dtype=dtype), "scores": _randn(2, 77, dtype=dtype, seed=1), "keep": 20},
    ),
    Case("resample_tokens", _resample_arguments),
)


if __name__ == "__main__":
    print(json.dumps([asdict(finding) for finding in check_kernels(torch.device("cpu"), torch.float32)]))
