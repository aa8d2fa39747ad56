"""The doctor knows every op, trusts a right kernel and finds a wrong one."""

import inspect

import pytest
import torch

import specvlm_kernels
from specvlm.doctor import CASES, PACKAGES, TOLERANCE, Finding, _tensors, check_kernels, diagnose

CPU = torch.device("cpu")


def finding(op: str) -> Finding:
    return next(found for found in check_kernels(CPU, torch.float32) if found.op == op)


def test_every_op_has_a_case():
    ops = {name for name in specvlm_kernels.__all__ if inspect.isfunction(getattr(specvlm_kernels, name))}
    assert {case.op for case in CASES} == ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_agrees_with_itself(dtype):
    assert check_kernels(CPU, dtype) == [Finding(case.op, 0.0, None) for case in CASES]


@pytest.mark.interpreter
def test_the_kernels_agree_in_the_interpreter():
    assert [found.problem for found in check_kernels(CPU, torch.float32)] == [None] * len(CASES)


@pytest.mark.gpu
def test_the_kernels_agree_on_a_gpu():
    assert [found.problem for found in check_kernels(torch.device("cuda"), torch.bfloat16)] == [None] * len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_a_kernel_that_does_nothing_is_found(monkeypatch, case):
    expected = getattr(specvlm_kernels, case.op)

    def idle(**arguments):
        copies = {name: one.clone() if isinstance(one, torch.Tensor) else one for name, one in arguments.items()}
        return [torch.zeros_like(tensor) for tensor in _tensors(expected(**copies))]

    monkeypatch.setattr(specvlm_kernels, case.op, idle)
    found = finding(case.op)
    assert found.error > 0.1
    assert found.problem.startswith("expected at most 0.0001")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [0, 2])
@pytest.mark.parametrize("op", [case.op for case in CASES if case.learned])
def test_a_wrong_gradient_is_found(monkeypatch, op, factor, dtype):
    right = getattr(specvlm_kernels, op)

    def wrong(**arguments):
        loss = right(**arguments)
        return factor * loss + (1 - factor) * loss.detach()

    monkeypatch.setattr(specvlm_kernels, op, wrong)
    found = next(found for found in check_kernels(CPU, dtype) if found.op == op)
    assert found.problem.startswith(f"expected at most {TOLERANCE[dtype]:g} from the reference")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda out: out.double(), "ValueError: expected torch.float32 [2, 20, 6, 64], got torch.float64"),
        (lambda out: out[:1], "ValueError: expected torch.float32 [2, 20, 6, 64], got torch.float32 [1,"),
        (lambda out: out * float("nan"), "ValueError: expected numbers that can be compared"),
        (lambda out: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_compared_is_a_problem(monkeypatch, spoil, problem):
    expected = specvlm_kernels.tree_attention
    monkeypatch.setattr(specvlm_kernels, "tree_attention", lambda **arguments: spoil(expected(**arguments)))
    found = finding("tree_attention")
    assert found.error is None
    assert found.problem.startswith(problem)


def test_a_diagnosis_runs_the_kernels_whatever_this_process_does():
    diagnosis = diagnose()
    assert diagnosis.healthy, diagnosis.findings
    assert diagnosis.how == ("compiled" if torch.cuda.is_available() else "interpreted")
    assert (diagnosis.gpu is None) == (not torch.cuda.is_available())
    assert [found.op for found in diagnosis.findings] == [case.op for case in CASES]
    assert diagnosis.versions.keys() == {"python", *PACKAGES}
