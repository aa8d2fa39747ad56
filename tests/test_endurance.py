"""Many answers in a row, of any length: what is kept for them, and recorded, is what the first ten needed."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from specvlm import SpecVLM
from specvlm.state import SLAB_STEP, SlabPool, capacity
from specvlm.targets.llama import LlamaTarget
from specvlm.tree import Plan
from tests.fakes import IMAGE_TOKEN, VOCAB, prompt_for, tiny_llava
from tests.test_graphs import Recorder
from tests.test_kernels_in_decoder import eagle

#: Prompt and answer together have fewer tokens than this, the prompt at least so many, the answer at most.
LONGEST, SHORTEST_PROMPT, MOST_NEW = 600, 30, 16
#: What the reference ops may come to remember, by temperature: the latest masks, and noise.
REMEMBERED = {0.0: 2**19, 1.0: 2**22}


def lengths(answers: int) -> Iterator[tuple[int, int]]:
    """Tokens of prompt and of answer: of the first nine, three times in each slab, then as it comes."""
    yield from [(total - MOST_NEW, MOST_NEW) for total in (100, 300, 560) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(answers - 9):
        total = int(torch.randint(SHORTEST_PROMPT + MOST_NEW, LONGEST, (1,), generator=generator))
        new = int(torch.randint(1, MOST_NEW + 1, (1,), generator=generator))
        yield total - new, new


def prompt_of(short: dict[str, Tensor], length: int, seed: int) -> dict[str, Tensor]:
    """A picture's prompt with random text behind it, `length` tokens."""
    ids = short["input_ids"]
    generator = torch.Generator().manual_seed(seed)
    more = torch.randint(IMAGE_TOKEN + 1, VOCAB, (1, length - ids.shape[1]), generator=generator)
    whole = torch.cat([ids, more.to(ids)], dim=1)
    return short | {"input_ids": whole, "attention_mask": torch.ones_like(whole)}


def bytes_alive() -> int:
    """What all tensors hold that anything refers to."""
    gc.collect()
    tensors = (one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter))
    storages = (one.untyped_storage() for one in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(
    ("answers", "temperature"),
    [(24, 0.0), pytest.param(200, 0.0, marks=pytest.mark.slow), pytest.param(200, 1.0, marks=pytest.mark.slow)],
)
def test_answers_of_any_length_need_what_the_first_ten_needed(answers, temperature, monkeypatch):
    made, new = [], SlabPool.new
    monkeypatch.setattr(SlabPool, "new", lambda pool, shape: made.append(shape) or new(pool, shape))
    model = tiny_llava(max_position_embeddings=1024)
    recorder = Recorder()
    specvlm = SpecVLM.from_target(LlamaTarget(model, recorder=recorder))
    head = eagle(specvlm, Plan(16, 3, 4))
    drafts = None, head, head  # a draft's first round comes once an answer, and is recorded in the second
    short, slabs, said = prompt_for(model), set(), []
    for i, (length, new_tokens) in enumerate(lengths(answers)):
        settings = {"max_new_tokens": new_tokens, "temperature": temperature, "seed": i}
        options = prompt_of(short, length, seed=i) | settings
        tokens = specvlm.generate(**options, draft=drafts[i % 3]).tokens
        slabs.add(capacity(length + new_tokens) // SLAB_STEP)
        if i % 7 == 6:
            said.append((options, tokens))
        if i == 9:
            needed, alive = (recorder.recordings, list(made)), bytes_alive()
    assert slabs == {1, 2, 3}
    assert (recorder.recordings, made) == needed
    assert recorder.replays > 2 * recorder.recordings
    assert bytes_alive() <= alive + REMEMBERED[temperature]
    plain = SpecVLM.from_target(LlamaTarget(model))
    for options, tokens in said:
        assert plain.generate(**options).tokens == tokens


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_of_any_length_neither_record_anew_nor_grow_on_a_gpu(temperature):
    model = tiny_llava(max_position_embeddings=1024).to("cuda", torch.bfloat16)
    target = LlamaTarget(model)
    specvlm = SpecVLM.from_target(target)
    head = eagle(specvlm, Plan(16, 3, 4))
    drafts, short, memory, recordings = (None, head, head), prompt_for(model), [], []
    for i, (length, new_tokens) in enumerate(lengths(200)):
        settings = {"max_new_tokens": new_tokens, "temperature": temperature, "seed": i}
        specvlm.generate(**prompt_of(short, length, seed=i), **settings, draft=drafts[i % 3])
        torch.cuda.synchronize()
        memory.append(torch.cuda.memory_allocated())
        recordings.append(sum(desk.recordings for desk in target._desks.values()))
    assert len(target._desks) == 3, "one of each size"
    assert recordings[-1] == recordings[9]
    assert max(memory[10:]) <= memory[9] + 2**20
