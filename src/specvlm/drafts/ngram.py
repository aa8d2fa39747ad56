"""A draft without weights: what followed the last tokens when they were seen before, in prompt or answer.

Prompt lookup decoding, with several continuations as branches of one tree.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from specvlm.checks import check_int
from specvlm.state import DecodeState
from specvlm.targets.base import Prompt, Target
from specvlm.tree import BUCKETS, DraftTree, tree_from_lists

#: Places of one suffix that are looked at, times the nodes of the tree.
PLACES = 4


@dataclass(slots=True)
class NGramDraft:
    """Proposes continuations of the longest suffix seen before, the latest first.

    Attributes:
        longest, shortest: lengths of the suffixes looked for, in tokens.
        depth: the most tokens of one continuation.
        nodes: the most nodes of the tree, root included.
        media_ids: what it never proposes; `bind` sets them.
    """

    longest: int = 4
    shortest: int = 1
    depth: int = 5
    nodes: int = 8
    media_ids: frozenset[int] = field(init=False, default=frozenset())

    #: Reads no features.
    taps = None

    def __post_init__(self) -> None:
        check_int("shortest", self.shortest, low=1)
        check_int("longest", self.longest, low=self.shortest)
        check_int("depth", self.depth, low=1, high=BUCKETS[-1] - 1)
        check_int("nodes", self.nodes, low=2, high=BUCKETS[-1])

    def bind(self, target: Target) -> None:
        """Fits every target, whose image and video ids it never proposes."""
        self.media_ids = target.spec.media_ids

    def start(self, prompt: Prompt, state: DecodeState) -> "NGramSession":
        """A session that knows the prompt's text; image tokens separate what stands before and after them."""
        return NGramSession(self, prompt.input_ids[0].tolist())


class NGramSession:
    """The tokens so far, and where each of their n-grams ended."""

    def __init__(self, draft: NGramDraft, prompt_ids: Sequence[int]) -> None:
        self._draft, self._media_ids = draft, draft.media_ids
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self._text_from = 0  # where the run of text that the last token belongs to begins
        for token in prompt_ids:
            self._append(token)
        self._answered = 0

    def propose(self, state: DecodeState) -> DraftTree:
        """A tree of the continuations found, or the root alone."""
        answer = state.tokens[0]
        for token in answer[self._answered :]:
            self._append(token)
        self._answered = len(answer)
        tokens, parents = self._grow()
        if len(tokens) == 1:
            return state.root_tree()
        return tree_from_lists(tokens, parents, device=state.kv_len.device)

    def _append(self, token: int) -> None:
        self._tokens.append(token)
        end = len(self._tokens)
        if token in self._media_ids:
            self._text_from = end
        for n in range(self._draft.shortest, self._draft.longest + 1):
            if n <= end - self._text_from:
                self._ends[tuple(self._tokens[end - n :])].append(end)

    def _grow(self) -> tuple[list[int], list[int]]:
        """Continuations merged into one tree: longer suffixes first, then later places, until it is full.

        Of a suffix, only the latest places are looked at: where they agree the tree is never full.
        """
        tokens, parents = [self._tokens[-1]], [-1]
        children: dict[tuple[int, int], int] = {}
        for n in range(self._draft.longest, self._draft.shortest - 1, -1):
            ends = self._ends.get(tuple(self._tokens[-n:]), ())
            for end in islice(reversed(ends), PLACES * self._draft.nodes):
                node = 0
                for place in range(end, min(end + self._draft.depth, len(self._tokens))):
                    token = self._tokens[place]
                    if token in self._media_ids:
                        break
                    child = children.get((node, token))
                    if child is None:
                        if len(tokens) == self._draft.nodes:
                            return tokens, parents
                        child = children[node, token] = len(tokens)
                        tokens.append(token)
                        parents.append(node)
                    node = child
        return tokens, parents
