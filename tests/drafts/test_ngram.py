"""The n-gram draft: what it remembers, what it proposes, what it never does."""

from types import SimpleNamespace

import torch

from specvlm.drafts import NGramDraft, NGramSession
from specvlm.drafts.ngram import PLACES
from specvlm.tree import root_only
from tests.fakes import IMAGE_TOKEN


def proposal(tokens, answer, media=(), **settings):
    """Tokens and parents of the tree proposed after `answer`, without padding."""
    draft = NGramDraft(**settings)
    draft.bind(SimpleNamespace(spec=SimpleNamespace(media_ids=frozenset(media))))
    session = NGramSession(draft, tokens)
    state = SimpleNamespace(
        tokens=[answer],
        root_tree=lambda: root_only(torch.tensor([answer[-1]])),
        kv_len=torch.tensor([len(tokens)], dtype=torch.int32),
    )
    tree = session.propose(state)
    used = 1 + int((tree.parents[0] >= 0).sum())
    return tree.tokens[0, :used].tolist(), tree.parents[0, :used].tolist()


def test_nothing_seen_before_gives_the_root_alone():
    assert proposal([1, 2, 3], [4]) == ([4], [-1])


def test_it_continues_the_longest_suffix():
    tokens = [10, 11, 12, 13, 14, 15, 16, 90, 12, 91, 92]
    assert proposal(tokens, [11, 12], longest=3, shortest=1, depth=3, nodes=4) == ([12, 13, 14, 15], [-1, 0, 1, 2])


def test_continuations_share_their_beginning_and_the_latest_comes_first():
    tokens = [5, 6, 1, 2, 3, 8, 5, 6, 1, 2, 4, 9]
    found = proposal(tokens, [5, 6], shortest=2, longest=2, depth=3, nodes=8)
    assert found == ([6, 1, 2, 4, 3], [-1, 0, 1, 2, 2])


def test_the_tree_stays_within_its_nodes_and_depth():
    tokens = [7, 1, 7, 2, 7, 3, 7, 4, 7, 5]
    found, parents = proposal(tokens, [7], shortest=1, longest=1, depth=1, nodes=4)
    assert found == [7, 5, 4, 3]
    assert parents == [-1, 0, 0, 0]


def test_the_answer_itself_is_remembered():
    assert proposal([1], [20, 21, 22, 23, 20, 21], depth=2)[0] == [21, 22, 23]


def test_a_text_that_repeats_itself_costs_no_more_where_it_is_long():
    class Counting(list):
        reads = 0

        def __getitem__(self, place):
            self.reads += 1
            return super().__getitem__(place)

    found = []
    for length in (500, 5000):
        draft = NGramDraft()
        session = NGramSession(draft, [7] * length)
        session._tokens = Counting(session._tokens)
        tokens, parents = session._grow()
        assert (tokens, parents) == ([7] * 6, [-1, *range(5)])
        found.append(session._tokens.reads)
    assert found[0] == found[1] <= draft.longest * (PLACES * draft.nodes * draft.depth + 2)


def test_image_tokens_are_neither_proposed_nor_part_of_a_suffix():
    tokens = [3, 8, 9, IMAGE_TOKEN, IMAGE_TOKEN, 8, 9, 5]
    media = {IMAGE_TOKEN}
    assert proposal(tokens, [8, 9], media, shortest=1)[0] == [9, 5, 8, 9]
    assert proposal([3, IMAGE_TOKEN, IMAGE_TOKEN, 6], [3], media, shortest=1) == ([3], [-1])
    assert proposal([1], [3, IMAGE_TOKEN, 3], media, shortest=1) == ([3], [-1]), "the target may say one itself"
