"""Where answers end, what streams, what is given back."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from specvlm import SpecVLM
from specvlm.decoder import DEFAULT_MAX_NEW_TOKENS
from specvlm.drafts import NGramDraft
from specvlm.drafts.growing import draft_slab
from specvlm.graphs import PLAIN_DESK
from specvlm.state import SlabPool
from specvlm.targets.hf_attention import ATTENTION
from tests.fakes import IMAGE_TOKEN, ScriptedDraft, picture, prompt_for, tiny_llava, tiny_processor


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture(scope="module")
def prompt(model):
    return prompt_for(model)


@pytest.fixture(scope="module")
def specvlm(model):
    return SpecVLM(model, processor=tiny_processor())


@pytest.fixture(scope="module")
def truth(specvlm, prompt) -> list[int]:
    return specvlm.generate(**prompt, max_new_tokens=100).tokens


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 9, 30])
def test_never_a_token_more_than_the_limit(specvlm, prompt, truth, limit):
    draft = ScriptedDraft(truth, depth=7)
    assert specvlm.generate(**prompt, max_new_tokens=limit, draft=draft).tokens == truth[:limit]


def test_the_answer_ends_at_eos_inside_an_accepted_run(model, prompt, truth):
    at = next(i for i in range(12, 60) if truth[i] not in truth[:i])
    model.generation_config.eos_token_id = [truth[at]]
    try:
        expected = model.generate(**prompt, do_sample=False, max_new_tokens=80)
        specvlm = SpecVLM(model)
        for draft in (None, ScriptedDraft(truth, depth=31)):
            answer = specvlm.generate(**prompt, max_new_tokens=80, draft=draft)
            assert answer.tokens == truth[: at + 1]
            assert torch.equal(answer.sequences, expected)
    finally:
        model.generation_config.eos_token_id = None


def test_the_answer_ends_at_a_stop_string_inside_an_accepted_run(specvlm, model, prompt, truth):
    tokenizer = specvlm.processor.tokenizer
    stop = next(
        text
        for i in range(10, 60)
        if len(text := tokenizer.decode(truth[i : i + 2])) > 1 and text.isascii() and text.isprintable()
    )
    expected = model.generate(**prompt, do_sample=False, max_new_tokens=80, stop_strings=[stop], tokenizer=tokenizer)
    assert expected.shape[1] < prompt["input_ids"].shape[1] + 80
    for draft in (None, ScriptedDraft(truth, depth=31)):
        answer = specvlm.generate(**prompt, max_new_tokens=80, stop_strings=[stop], draft=draft)
        assert torch.equal(answer.sequences, expected)


def test_lengths_come_from_the_generation_config(model, prompt):
    config, length = model.generation_config, prompt["input_ids"].shape[1]
    try:
        config.max_new_tokens = 5
        assert len(SpecVLM(model).generate(**prompt).tokens) == 5
        config.max_new_tokens, config.max_length = None, length + 9
        assert len(SpecVLM(model).generate(**prompt).tokens) == 9
        config.max_length = length
        with pytest.raises(ValueError, match=f"max_length: expected more than the prompt's {length} tokens"):
            SpecVLM(model).generate(**prompt)
    finally:
        config.max_new_tokens = config.max_length = None
    assert len(SpecVLM(model).generate(**prompt).tokens) == DEFAULT_MAX_NEW_TOKENS


def test_a_full_context_is_used_to_its_last_position(specvlm, prompt, truth):
    left = specvlm.target.spec.context - prompt["input_ids"].shape[1]
    plain = specvlm.generate(**prompt, max_new_tokens=left)
    assert len(plain.tokens) == left
    drafted = specvlm.generate(**prompt, max_new_tokens=left, draft=ScriptedDraft(plain.tokens, depth=7))
    assert drafted.tokens == plain.tokens


def test_padding_counts_for_nothing(specvlm, model, prompt, truth):
    ids = prompt["input_ids"]
    padded = prompt | {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1),
        "attention_mask": torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], dim=1),
    }
    unmasked = {name: value for name, value in padded.items() if name != "attention_mask"}
    model.generation_config.pad_token_id = 0
    try:
        answer = SpecVLM(model).generate(**unmasked, max_new_tokens=20)
        assert torch.equal(answer.sequences, model.generate(**unmasked, do_sample=False, max_new_tokens=20))
    finally:
        model.generation_config.pad_token_id = None
    answer = specvlm.generate(**padded, max_new_tokens=20)
    assert answer.tokens == truth[:20]
    assert torch.equal(answer.sequences, model.generate(**padded, do_sample=False, max_new_tokens=20))


class RecordingStreamer(BaseStreamer):
    """Keeps what it is fed."""

    def __init__(self) -> None:
        self.fed: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.fed.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_is_fed_the_prompt_then_the_answer_then_the_end(specvlm, prompt, truth):
    streamer = RecordingStreamer()
    answer = specvlm.generate(**prompt, max_new_tokens=20, draft=ScriptedDraft(truth, depth=7), streamer=streamer)
    assert streamer.fed[0] == prompt["input_ids"][0].tolist()
    assert [token for fed in streamer.fed[1:] for token in fed] == answer.tokens
    assert max(map(len, streamer.fed[1:])) == 8
    assert streamer.ended


def test_the_streamers_of_transformers_print_the_answer(specvlm, prompt, truth, capsys):
    tokenizer = specvlm.processor.tokenizer
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    specvlm.generate(**prompt, max_new_tokens=20, draft=ScriptedDraft(truth, depth=7), streamer=streamer)
    assert capsys.readouterr().out == tokenizer.decode(truth[:20]) + "\n"


def test_rounds_tell_which_tokens_the_draft_had_proposed(specvlm, prompt, truth):
    rounds = list(specvlm.stream(**prompt, max_new_tokens=18, draft=ScriptedDraft(truth, depth=3)))
    assert [len(r.tokens[0]) for r in rounds] == [1, 4, 4, 4, 4, 1]
    assert [r.from_draft for r in rounds] == [[0], [3], [3], [3], [3], [1]]
    assert [r.accepted for r in rounds] == [[0], [3], [3], [3], [3], [3]]


def free_slabs(specvlm: SpecVLM) -> int:
    return len(specvlm.target._pool._idle)


def test_an_abandoned_stream_gives_its_slab_back(model, prompt):
    specvlm = SpecVLM(model)
    kept = free_slabs(specvlm)
    stream = specvlm.stream(**prompt, max_new_tokens=50)
    next(stream)
    next(stream)
    assert free_slabs(specvlm) == kept - 1
    stream.close()
    assert free_slabs(specvlm) == kept
    stream = specvlm.stream(**prompt, max_new_tokens=50)
    next(stream)
    assert free_slabs(specvlm) == kept - 1
    del stream
    assert free_slabs(specvlm) == kept


def test_two_streams_do_not_disturb_each_other(specvlm, model, prompt, truth):
    other = prompt_for(model, seed=5)
    alone = specvlm.generate(**other, max_new_tokens=40, temperature=1.0).tokens
    first = specvlm.stream(**prompt, max_new_tokens=40, draft=ScriptedDraft(truth, depth=3))
    second = specvlm.stream(**other, max_new_tokens=40, temperature=1.0, draft=NGramDraft())
    said: tuple[list[int], list[int]] = ([], [])
    streams = {0: first, 1: second}
    while streams:
        for which, stream in list(streams.items()):
            emitted = next(stream, None)
            if emitted is None:
                del streams[which]
            else:
                said[which].extend(emitted.tokens[0])
    assert said == (truth[:40], alone)


def test_threads_share_a_model(model):
    specvlm = SpecVLM(model)
    asked = [(prompt_for(model, seed=seed), draft) for seed, draft in ((0, None), (1, "ngram"))]
    alone = [specvlm.generate(**prompt, draft=draft, max_new_tokens=40).tokens for prompt, draft in asked]
    implementation = model.config.text_config._attn_implementation

    def answers(which: int) -> list[list[int]]:
        prompt, draft = asked[which]
        return [specvlm.generate(**prompt, draft=draft, max_new_tokens=40).tokens for _ in range(4)]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(answers, (0, 1))) == [[tokens] * 4 for tokens in alone]
    assert model.config.text_config._attn_implementation == implementation != ATTENTION


def test_a_pool_keeps_no_more_idle_than_it_may(monkeypatch):
    pool = SlabPool(layers=1, kv_heads=1, head_dim=32, dtype=torch.float32, device=torch.device("cpu"))
    slabs = [pool.borrow(1, slots) for slots in (256, 512, 768)]
    monkeypatch.setattr("specvlm.state.IDLE_BYTES", slabs[1].nbytes + slabs[2].nbytes)
    for slab in slabs:
        pool.give_back(slab)
    assert pool.borrow(1, 512) is slabs[1]
    assert pool.borrow(1, 768) is slabs[2]
    assert pool.borrow(1, 256) is not slabs[0], "the longest idle made room"
    big = pool.borrow(1, 4096)
    pool.give_back(big)
    assert pool.borrow(1, 4096) is big, "one slab may be larger"


def test_idle_slabs_make_room_for_a_drafts(monkeypatch):
    pool = SlabPool(layers=2, kv_heads=1, head_dim=32, dtype=torch.float32, device=torch.device("cpu"))
    slab = pool.borrow(1, 256)
    pool.give_back(pool.borrow(1, 512))
    state = SimpleNamespace(desk=PLAIN_DESK, slab=slab, pool=pool)
    monkeypatch.setattr("specvlm.state.free_bytes", lambda _: slab.nbytes // 2 if pool._idle else slab.nbytes)
    assert draft_slab(state, 2, 1, 32).shape == slab.shape
    with pytest.raises(ValueError, match=r"KV cache: expected at most .* for 1 x 256 positions in 3 layers"):
        draft_slab(state, 3, 1, 32)


def test_a_prompt_without_a_picture(specvlm, model):
    prompt = prompt_for(model, images=0)
    expected = model.generate(**prompt, do_sample=False, max_new_tokens=30)
    assert torch.equal(specvlm.generate(**prompt, max_new_tokens=30, draft="ngram").sequences, expected)


def test_ask_answers_with_text(specvlm, tmp_path):
    text = specvlm.ask(picture(), "what is it", max_new_tokens=12)
    picture().save(tmp_path / "picture.png")
    assert isinstance(text, str)
    assert specvlm.ask(tmp_path / "picture.png", "what is it", max_new_tokens=12) == text
    assert specvlm.ask([picture(), picture(1)], "what is it", max_new_tokens=12)


def test_the_prompt_holds_a_placeholder_an_image_row(specvlm):
    inputs = specvlm.prepare([picture(), picture(1)], "what is it")
    assert int((inputs["input_ids"] == IMAGE_TOKEN).sum()) == 32


def test_a_template_that_writes_the_bos_token_gets_no_second_one(specvlm):
    processor = tiny_processor()
    plain = SpecVLM(specvlm.target.model, processor=processor).prepare(picture(), "what is it")["input_ids"]
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", processor.tokenizer.bos_token_id)]
    )
    once = SpecVLM(specvlm.target.model, processor=processor).prepare(picture(), "what is it")["input_ids"]
    assert once[0].tolist() == [processor.tokenizer.bos_token_id, *plain[0].tolist()]


def test_sequences_lie_where_the_prompt_lay(specvlm, prompt):
    answer = specvlm.generate(**prompt, max_new_tokens=3)
    assert answer.sequences.dtype == torch.int64
    assert answer.sequences[0, -3:].tolist() == answer.tokens
