"""What the decoding loop asks of a draft."""

from typing import Protocol, runtime_checkable

from specvlm.state import DecodeState
from specvlm.targets.base import Prompt, Target
from specvlm.tree import DraftTree, tree_from_lists


class DraftSession(Protocol):
    """A draft at work on one answer: its own KV, its own length, its policy's statistics."""

    def propose(self, state: DecodeState) -> DraftTree:
        """A tree below the last emitted token. Tokens emitted since the last call are in `state.step`."""
        ...


@runtime_checkable
class Draft(Protocol):
    """Weights only, shared by answers."""

    @property
    def taps(self) -> tuple[int, ...] | None:
        """Which of the target's features the draft reads: None for the post-final-norm ones, else the inputs of those
        layers, concatenated."""
        ...

    def bind(self, target: Target) -> None:
        """Fits the draft to the target.

        Raises:
            ValueError: naming what does not fit.
        """
        ...

    def start(self, prompt: Prompt, state: DecodeState) -> DraftSession:
        """A session for the answer to `prompt`."""
        ...


class NoDraft:
    """Autoregressive decoding: a tree of the root alone. Draft and session in one, for it remembers nothing."""

    taps: tuple[int, ...] | None = None

    def bind(self, target: Target) -> None:
        """Fits every target."""

    def start(self, prompt: Prompt, state: DecodeState) -> DraftSession:
        """Itself: there is nothing to keep from round to round."""
        return self

    def propose(self, state: DecodeState) -> DraftTree:
        """The root."""
        return state.root_tree()


class Rehearsal(NoDraft):
    """Trees of one size that propose the root again and again, for a warm-up.

    Args:
        nodes: how many, root included.
        taps: of the draft that is to come.
    """

    def __init__(self, nodes: int, taps: tuple[int, ...] | None) -> None:
        self._nodes, self.taps = nodes, taps

    def propose(self, state: DecodeState) -> DraftTree:
        """The root, with children."""
        if self._nodes == 1:
            return state.root_tree()
        parents = [-1] + [0] * (self._nodes - 1)
        return tree_from_lists([state.tokens[0][-1]] * self._nodes, parents, device=state.kv_len.device)
