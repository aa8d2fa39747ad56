"""What a terminal shows, and what a file gets instead."""

from io import StringIO

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from specvlm.console import ACCEPTED, OWN, AnswerPrinter, Detokenizer, bytes_bar, screen, table
from specvlm.state import Emitted
from tests.fakes import tiny_processor

TEXT = "a red circle, naïve café 你好 🙂 end"


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama's: words carry the space before them, and decoding drops the answer's first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="module", params=["byte-level", "words"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return tiny_processor().tokenizer if request.param == "byte-level" else word_tokenizer()


def console(*, terminal: bool) -> Console:
    return Console(file=StringIO(), force_terminal=terminal, color_system="standard" if terminal else None, width=20)


def shown(console: Console) -> str:
    return console.file.getvalue()


def test_pieces_add_up_to_the_text_and_hold_whole_characters(tokenizer):
    tokens = [*tokenizer.encode(TEXT, add_special_tokens=False), tokenizer.eos_token_id]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add([token]) for token in tokens]
    assert "".join(pieces) + detokenizer.end() == tokenizer.decode(tokens, skip_special_tokens=True) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_round_of_many_tokens_says_what_they_say_one_by_one(tokenizer):
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.add(tokens[at : at + 3]) for at in range(0, len(tokens), 3)) == TEXT


def test_a_character_that_is_never_completed_comes_at_the_end():
    tokenizer = tiny_processor().tokenizer
    tokens = tokenizer.encode("ok 🙂", add_special_tokens=False)[:-1]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.add(tokens).rstrip() == "ok"
    assert "\N{REPLACEMENT CHARACTER}" in detokenizer.end()


def printed(console: Console) -> str:
    """An answer of four rounds, the second of which ends inside a character."""
    tokenizer = tiny_processor().tokenizer
    tokens = tokenizer.encode(" ok 🙂 [bold]\tthen", add_special_tokens=False)
    rounds = [tokens[:1], tokens[1:5], tokens[5:7], tokens[7:]]
    printer = AnswerPrinter(console, tokenizer)
    for i, new in enumerate(rounds):
        printer.add(Emitted([new], [len(new) - 1 if i else 0], [0]))
    printer.end()
    return shown(console)


def test_without_a_terminal_an_answer_is_plain_text():
    assert printed(console(terminal=False)) == "ok 🙂 [bold]\tthen\n"


def test_on_a_terminal_accepted_tokens_and_the_targets_own_differ():
    text = printed(console(terminal=True))
    green, own = "\x1b[32m", "\x1b[1;33m"
    assert (ACCEPTED, OWN) == ("green", "bold yellow")
    assert green in text
    assert own in text
    assert "".join(part.split("m", 1)[-1] for part in text.split("\x1b[")) == "ok 🙂 [bold]\tthen\n"


def test_a_long_answer_is_not_wrapped():
    tokenizer = tiny_processor().tokenizer
    target = screen()
    target.file = StringIO()
    printer = AnswerPrinter(target, tokenizer)
    text = "a red circle " * 20
    printer.add(Emitted([tokenizer.encode(text, add_special_tokens=False)], [0], [0]))
    printer.end()
    assert shown(target) == text + "\n"


def test_a_table_without_a_terminal_has_no_control_codes_and_no_markup():
    target = console(terminal=False)
    target.print(table(("draft", "tau"), [("[red]x", "1.00"), ("ngram", "12.30")]))
    text = shown(target)
    assert "\x1b" not in text
    assert "[red]x" in text
    assert [line.split() for line in text.splitlines() if "ngram" in line] == [["ngram", "12.30"]]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_for_terminals_alone(monkeypatch, terminal):
    screen = console(terminal=terminal)
    screen.width = 80
    monkeypatch.setattr("specvlm.console.screen", lambda stderr: screen)
    with bytes_bar("counting", 4000) as show:
        for done in (1000, 4000):
            show(done)
    assert ("counting" in shown(screen) and "4.0/4.0 kB" in shown(screen)) == terminal
    assert terminal or not shown(screen)
