"""What people read: answers as they come, in two colours, and tables. Plain text where there is no terminal."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from specvlm.state import Emitted

#: Told apart without colour as well: one of the two is bold.
ACCEPTED: Final = "green"
OWN: Final = "bold yellow"

#: What decoders put where bytes are no whole character.
_INCOMPLETE: Final = "\N{REPLACEMENT CHARACTER}"


def screen(*, stderr: bool = False) -> Console:
    """A console that leaves text as it is: no highlighting, no markup, no wrapping."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


@contextmanager
def bytes_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` bytes on stderr, with an estimate of the time left; nothing where there is no terminal.

    Yields:
        what tells it how many bytes are done.
    """
    console = screen(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


class Counter(Protocol):
    """Tells a bar how far a work has come, and what there is to say of it."""

    def __call__(self, done: int, note: str = "") -> None: ...


@contextmanager
def counting_bar(what: str, total: int, *, shown: bool = True) -> Iterator[Counter]:
    """A bar over `total` steps on stderr, with an estimate of the time left; nothing where there is no terminal.

    Yields:
        what tells it how many steps are done.
    """
    console = screen(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done, note="": progress.update(task, completed=done, description=f"{what}  {note}".rstrip())


def legend() -> Text:
    """What the two colours of an answer mean."""
    return Text.assemble(("accepted from the draft", ACCEPTED), ", ", ("the target's own", OWN))


class Detokenizer:
    """Turns tokens into text as they come; bytes of an unfinished character wait for the rest of it.

    Text is the difference between two decodings of a short window, since what a token says may hang on the one
    before it: the first word of a Llama answer loses its space, later ones do not.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._told = 0  # tokens of the window whose text is out

    def add(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` complete."""
        return "".join(self._add(token) for token in tokens)

    def end(self) -> str:
        """What waited in vain, as the tokenizer decodes it."""
        return self._new(self._decode(self._window))

    def _add(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        new = self._new(text)
        if not new or text.endswith(_INCOMPLETE):
            return ""
        self._window = self._window[self._told :]
        self._told = len(self._window)
        return new

    def _new(self, text: str) -> str:
        return text[len(self._decode(self._window[: self._told])) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class AnswerPrinter:
    """Prints an answer round by round: accepted tokens in one colour, the target's own in another."""

    def __init__(self, console: Console, tokenizer: Any) -> None:
        self._console = console
        self._detokenizer = Detokenizer(tokenizer)
        self._started = False

    def add(self, emitted: Emitted) -> None:
        """Prints what a round emitted."""
        tokens, drafted = emitted.tokens[0], emitted.from_draft[0]
        self._print(self._detokenizer.add(tokens[:drafted]), ACCEPTED)
        self._print(self._detokenizer.add(tokens[drafted:]), OWN)

    def end(self) -> None:
        """Ends the line."""
        self._print(self._detokenizer.end(), OWN)
        self._console.print()

    def _print(self, text: str, style: str) -> None:
        if not self._started:
            text = text.lstrip()
        if text:
            self._started = True
            # A segment, since rich makes spaces of a text's tabs.
            self._console.print(Segments([Segment(text, Style.parse(style))]), end="")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of text: the first column to the left, the others to the right."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made
