"""Where a round's time goes: the target and the draft, wrapped so that their calls are timed."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specvlm.drafts import Draft, DraftSession
from specvlm.state import DecodeState, Limits, Sampling, Scores
from specvlm.targets.base import Prompt, Target
from specvlm.tree import DraftTree


@dataclass(slots=True)
class Trace:
    """Seconds spent in the models since it was made; the rest of a round is the host's.

    Attributes:
        draft: in the draft's forwards.
        verify: in `Target.verify`, the target's.
        propose: in `DraftSession.propose`: the draft's forwards, and the tree's growth around them.
    """

    draft: float = 0.0
    verify: float = 0.0
    propose: float = 0.0

    @property
    def growth(self) -> float:
        """In `DraftSession.propose` outside the draft's forwards: choosing children, nodes and the next shape."""
        return self.propose - self.draft

    @contextmanager
    def forward(self, device: torch.device) -> Iterator[None]:
        """What a draft's forward runs in."""
        started = _now(device)
        yield
        self.draft += _now(device) - started


class TracedTarget:
    """A target whose forwards are timed. On a GPU each waits for the device, so a round is slower than untraced."""

    def __init__(self, target: Target, trace: Trace) -> None:
        self._target, self._trace = target, trace
        self.spec, self.model, self.input_names = target.spec, target.model, target.input_names

    def embed(self, tokens: Tensor) -> Tensor:
        return self._target.embed(tokens)

    def head(self, hidden: Tensor) -> Tensor:
        return self._target.head(hidden)

    def head_rows(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._target.head_rows(ids)

    def prefill(
        self, inputs: Mapping[str, Any], *, sampling: Sampling, limits: Limits, taps: tuple[int, ...] | None
    ) -> tuple[DecodeState, Prompt]:
        return self._target.prefill(inputs, sampling=sampling, limits=limits, taps=taps)

    def verify(self, tree: DraftTree, state: DecodeState) -> Scores:
        started = _now(self.spec.device)
        scores = self._target.verify(tree, state)
        self._trace.verify += _now(self.spec.device) - started
        return scores


class TracedDraft:
    """A draft whose proposals are timed, and in them its forwards; what it asks of the target is among those."""

    def __init__(self, draft: Draft, trace: Trace) -> None:
        self._draft, self._trace = draft, trace
        self.taps = draft.taps

    def bind(self, target: Target) -> None:
        self._draft.bind(target)

    def start(self, prompt: Prompt, state: DecodeState) -> DraftSession:
        state.drafting = partial(self._trace.forward, state.kv_len.device)
        return _TracedSession(self._draft.start(prompt, state), self._trace)


class _TracedSession:
    def __init__(self, session: DraftSession, trace: Trace) -> None:
        self._session, self._trace = session, trace

    def propose(self, state: DecodeState) -> DraftTree:
        device = state.kv_len.device
        started = _now(device)
        tree = self._session.propose(state)
        self._trace.propose += _now(device) - started
        return tree


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
