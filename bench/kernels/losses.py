"""A training step's losses, forward and backward, against plain torch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.kernels.draws import VOCABULARIES
from bench.kernels.registry import Call, Case, Place, Problem, require_close
from specvlm_kernels import reference, soft_cross_entropy, total_variation

#: Rows that a training step's answers come to, and how many of them are checked in fp64.
TAUGHT, CHECKED = 2048, 64

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def plain_cross_entropy(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    p = teacher_logits.float().softmax(-1)
    return -(p * logits.float().log_softmax(-1)).sum(-1)


def plain_variation(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    return (logits.float().softmax(-1) - teacher_logits.float().softmax(-1)).abs().sum(-1)


def loss_cases() -> Iterator[Case]:
    for vocabulary in VOCABULARIES:
        yield loss_case("soft_cross_entropy", soft_cross_entropy, plain_cross_entropy, TAUGHT, vocabulary)
        yield loss_case("total_variation", total_variation, plain_variation, TAUGHT, vocabulary)


def loss_case(name: str, loss: Loss, plain: Loss, rows: int, vocabulary: int) -> Case:
    return Case(
        name,
        f"{rows} rows, V {vocabulary}, forward and backward",
        2 * (2 + 2 + 1) * rows * vocabulary,  # both read twice, the gradient written
        lambda place: loss_problem(place, name, loss, plain, rows, vocabulary),
        facts={"rows": rows, "vocabulary": vocabulary},
    )


def loss_problem(place: Place, name: str, loss: Loss, plain: Loss, rows: int, vocabulary: int) -> Problem:
    turns = place.turns(4 * rows * vocabulary)
    logits = [(3 * place.randn(rows, vocabulary)).requires_grad_() for _ in range(turns)]
    teachers = [3 * place.randn(rows, vocabulary) for _ in range(turns)]

    def step(loss: Loss, turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = loss(logits[turn], teachers[turn])
        return found.detach(), torch.autograd.grad(found.sum(), logits[turn])[0]

    def check() -> None:
        some = slice(0, CHECKED)
        z = logits[0][some].detach().double().requires_grad_()
        value = getattr(reference, name)(z, teachers[0][some].double())
        exact = (value.detach(), torch.autograd.grad(value.sum(), z)[0])
        for got, usual, true in zip(step(loss, 0), step(plain, 0), exact, strict=True):
            require_close(name, got[some], usual[some], true)

    def compiled() -> Call:
        fast: Any = place.compiled(plain, dynamic=False)
        return lambda turn: step(fast, turn)

    slow = {"torch.compile": compiled} if vocabulary == VOCABULARIES[0] else {}
    return Problem(check, lambda turn: step(loss, turn), turns, {"torch": lambda: lambda turn: step(plain, turn)}, slow)
