"""The command line: `specvlm demo`, `generate`, `check`, `train`, `vocab` and `doctor`.

Options are the fields of dataclasses: `GenerateConfig` says how tokens are drawn, here as in Python.
"""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from specvlm.config import GenerateConfig, Recipe, TrainConfig
from specvlm.options import run, with_options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from specvlm.decoder import SpecVLM
    from specvlm.doctor import Diagnosis
    from specvlm.equality import Comparison
    from specvlm.measuring import Row
    from specvlm.stats import Stats

#: The exit status of what was done and found wanting.
FAILED = 1

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Images = Annotated[
    list[Path] | None, typer.Option("--image", help="A picture file (may be given again).", show_default=False)
]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and exits: with 2, after one line, for what a user got wrong."""
    run(app, "specvlm", arguments)


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model answers, and where."""

    target: str = field(metadata={"help": "Folder or hub id of a LLaVA in transformers' format, or demo."})
    draft: str | None = field(
        default=None,
        metadata={"help": "ngram, demo, demo-ngram, demo-vlm, a folder or a hub id; by default the target's own."},
    )
    dtype: str | None = field(
        default=None, metadata={"help": "float32, float16 or bfloat16; by default bfloat16 on a GPU, else float32."}
    )
    device: str | None = field(default=None, metadata={"help": "cuda or cpu; by default the GPU if there is one."})

    def load(self) -> "SpecVLM":
        """The model, without what transformers would say and show meanwhile."""
        from specvlm.loading import load

        _silence()
        return load(self.target, self.draft, dtype=self.dtype, device=self.device)


def _silence() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@app.callback(invoke_without_command=True)
def specvlm(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and nothing else.")] = False,
) -> None:
    """Vision-language models that answer faster without one token of the answer changing."""
    if show_version:
        print("specvlm", version("specvlm"))
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    picture: Annotated[
        Path | None, typer.Option(help="Where the picture goes; by default into the folder for temporary files.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the model that ships: a picture, a question, the answer, and how fast each draft gets it."""
    from specvlm.console import legend, screen
    from specvlm.demo.run import MAX_NEW_TOKENS, REPEATS, SECONDS, TEMPERATURES, demo_drafts, tasks
    from specvlm.measuring import measure

    console, notes = screen(), screen(stderr=True)
    path = picture or Path(tempfile.gettempdir()) / "specvlm-demo.png"
    todo = tasks()
    shown = todo[0]
    try:
        shown.picture.save(path)
    except (OSError, ValueError) as error:  # the latter of an unknown suffix
        wanted = "picture: expected where a picture file can be written"
        raise ValueError(f"{wanted}, got {str(path)!r}: {error}") from error
    model = ModelChoice("demo").load()
    prompts: list[dict[str, Any]] = [model.prepare(task.picture, task.question) for task in todo]
    about = {"picture": str(path), "scene": shown.contents, "question": shown.question}
    if as_json:
        tokens = model.generate(**prompts[0], max_new_tokens=MAX_NEW_TOKENS).tokens
    else:
        for name, value in about.items():
            console.print(f"{name:10}{value}")
        console.print("answer    ", end="")
        tokens, _ = _streamed(model, prompts[0], {"max_new_tokens": MAX_NEW_TOKENS, "seed": 0}, console)
    about["answer"] = _text(model, tokens)
    right = shown.is_answered_by(about["answer"])
    if not as_json:
        console.print("         ", legend())
        console.print("judged    " + ("true of the scene, and complete" if right else "wrong, or not complete"))
    rows: list[Row] = []
    done, began = 0, time.perf_counter()
    with notes.status("measuring") as status:
        limits: dict[str, Any] = {"repeats": REPEATS, "max_new_tokens": MAX_NEW_TOKENS}
        repeats = measure(model, prompts, demo_drafts(), temperatures=TEMPERATURES, **limits)
        for done, latest in enumerate(repeats, start=1):
            rows = latest
            status.update(f"measuring, {done} of {REPEATS} repeats done")
            if time.perf_counter() - began > SECONDS:
                break
    if as_json:
        _print_json(about | {"right": right, "rows": [row.summary() for row in rows]})
        return
    console.print(_speeds(rows))
    repeated = "one repeat" if done == 1 else f"medians of {done} repeats"
    console.print(f"{repeated} over {len(todo)} questions; AR is the same engine without a draft")


@app.command()
@with_options
def generate(
    choice: ModelChoice,
    config: GenerateConfig,
    prompt: Annotated[str, typer.Option(help="The question; the model's chat format is put around it.")],
    image: Images = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question about one or several pictures, or about none."""
    from specvlm.console import legend, screen

    model = choice.load()
    inputs: dict[str, Any] = model.prepare(image or [], prompt)
    if as_json:
        answer = model.generate(**inputs, **asdict(config))
        _print_json({"text": _text(model, answer.tokens), "tokens": answer.tokens, "stats": asdict(answer.stats)})
        return
    notes = screen(stderr=True)
    _, stats = _streamed(model, inputs, asdict(config), screen())
    if stats.from_draft:
        notes.print(legend())
    notes.print(
        f"{stats.tokens} tokens in {stats.rounds + 1} rounds, tau {stats.tau:.2f}, tokens/s: "
        f"{stats.tokens_per_second:.1f} decode only, {stats.end_to_end_tokens_per_second:.1f} end to end"
    )


@app.command()
@with_options
def check(
    choice: ModelChoice,
    config: GenerateConfig,
    prompt: Annotated[str | None, typer.Option(help="The question.")] = None,
    image: Images = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file of questions, one JSON object a line: prompt, and image: a path, or a list of paths, "
            "from the file's folder."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare answers with a draft and without, token by token; exit status 1 if any differ."""
    from specvlm.equality import compare

    questions = _questions(prompt, image, prompts)
    model = choice.load()
    for pictures, question in questions:
        model.prepare(pictures, question)  # so that a bad picture is refused before anything is answered
    results: list[Comparison] = []
    for number, (pictures, question) in enumerate(questions):
        results.append(compare(model, model.prepare(pictures, question), config))
        if not as_json:
            print(f"prompt {number}: {_verdict(results[-1], model)}", flush=True)
    equal = sum(result.divergence is None for result in results)
    if as_json:
        _print_json({"equal": equal == len(results), "prompts": [asdict(result) for result in results]})
    else:
        print(f"{equal} of {len(results)} equal")
    if equal < len(results):
        raise typer.Exit(FAILED)


@app.command()
@with_options
def train(config: TrainConfig, recipe: Recipe, as_json: AsJson = False) -> None:
    """Teach a draft what a target says to the questions of a set; a run that was stopped goes on where it was."""
    from specvlm.training.run import train

    _silence()
    found = train(config, recipe)
    if found is None:
        return
    if as_json:
        _print_json(asdict(found))
        return
    tau = "" if found.tau is None else f", tau {found.tau:.2f}"
    print(f"{found.out}: {found.steps} steps, {found.epochs:.2f} epochs of {found.examples} examples{tau}")


@app.command()
def vocab(
    target: Annotated[
        str, typer.Option(help="Folder or hub id of a LLaVA in transformers' format, or demo; no weights are read.")
    ],
    text: Annotated[
        list[Path],
        typer.Option(
            help="A file to count: .txt, a document a line, or .jsonl, an object with text or caption a line "
            "(may be given again)."
        ),
    ],
    keep: Annotated[int, typer.Option(help="How many token ids.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    as_json: AsJson = False,
) -> None:
    """Write down the most frequent tokens of a text, for a draft that proposes those alone."""
    from specvlm.console import bytes_bar
    from specvlm.loading import load_spec
    from specvlm.vocabulary import check_keep, count_tokens, most_frequent, write_vocabulary

    _silence()
    spec = load_spec(target)
    check_keep(keep, spec)
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"out: expected a file in a folder that is there, got {out}")
    with bytes_bar("counting", sum(path.stat().st_size for path in text)) as show:
        for found in count_tokens(text, spec):
            show(found.bytes_read)
    ids = most_frequent(found.counts, keep, spec)
    write_vocabulary(out, ids)
    tokens, share = int(found.counts.sum()), found.share(ids)
    if as_json:
        about = {"out": str(out), "ids": len(ids), "vocab_size": spec.vocab_size, "documents": found.documents}
        _print_json(about | {"tokens": tokens, "share": share})
        return
    print(f"{len(ids)} of {spec.vocab_size} ids: {share:.2%} of {tokens} tokens in {found.documents} documents")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has, and run each kernel against its reference; exit status 1 if one disagrees."""
    from specvlm.console import screen, table
    from specvlm.doctor import diagnose

    with screen(stderr=True).status("running the kernels"):
        diagnosis = diagnose()
    if as_json:
        _print_json(asdict(diagnosis) | {"healthy": diagnosis.healthy})
    else:
        console = screen()
        for name, found in (diagnosis.versions | {"gpu": diagnosis.gpu}).items():
            console.print(f"{name:14}{found or 'none'}")
        console.print(table(("op", "ran", "largest error", "verdict"), _doctor_rows(diagnosis)))
        for problem, ops in _problems(diagnosis).items():
            console.print(f"{', '.join(ops)}: {problem}")
    if not diagnosis.healthy:
        raise typer.Exit(FAILED)


def _speeds(rows: "Sequence[Row]") -> "Table":
    from specvlm.console import table

    columns = ("draft", "temperature", "tokens/s\ndecode only", "tokens/s\nend to end", "tau", "identical\nto AR")
    cells = (
        (
            row.draft or "none (AR)",
            f"{row.temperature:g}",
            f"{row.decode.median:.0f}",
            f"{row.end_to_end.median:.0f}",
            f"{row.tau:.2f}",
            "yes" if row.identical else "NO",
        )
        for row in rows
    )
    return table(columns, cells)


def _doctor_rows(diagnosis: "Diagnosis") -> Iterator[tuple[str, ...]]:
    for found in diagnosis.findings:
        error = "" if found.error is None else f"{found.error:.1e}"
        yield found.op, diagnosis.how, error, "agrees" if found.problem is None else "FAILS"


def _problems(diagnosis: "Diagnosis") -> dict[str, list[str]]:
    """What is wrong, and with which ops."""
    problems: dict[str, list[str]] = defaultdict(list)
    for found in diagnosis.findings:
        if found.problem is not None:
            problems[found.problem].append(found.op)
    return problems


def _streamed(
    model: "SpecVLM", inputs: Mapping[str, Any], options: Mapping[str, Any], console: "Console"
) -> tuple[list[int], "Stats"]:
    """Prints an answer as it comes; its tokens, and how it went, printing included."""
    from specvlm.console import AnswerPrinter
    from specvlm.stats import StatsRecorder

    printer = AnswerPrinter(console, model.processor.tokenizer)
    recorder = StatsRecorder(options["seed"])
    tokens: list[int] = []
    for emitted in model.stream(**inputs, **options):
        recorder.add(emitted)
        printer.add(emitted)
        tokens += emitted.tokens[0]
    printer.end()
    return tokens, recorder.stats()


def _text(model: "SpecVLM", tokens: list[int]) -> str:
    return model.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def _questions(prompt: str | None, image: list[Path] | None, prompts: Path | None) -> list[tuple[list[Path], str]]:
    """Pictures and question: those given, or of every line of a file."""
    if prompt is not None and prompts is None:
        return [(image or [], prompt)]
    if prompt is not None or prompts is None:
        raise ValueError("prompt: expected --prompt or --prompts, got " + ("neither" if prompt is None else "both"))
    if image:
        raise ValueError("image: expected pictures in the file given by --prompts, got --image besides")
    try:
        lines = prompts.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: expected UTF-8 in {prompts}, got {error}") from error
    except OSError as error:
        raise ValueError(f"prompts: expected a file that can be read, got {error}") from error
    questions = [_question(line, number, prompts) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise ValueError(f"prompts: expected at least one line in {prompts}, got none")
    return questions


def _question(line: str, number: int, path: Path) -> tuple[list[Path], str]:
    try:
        entry = json.loads(line)
        prompt, images = entry["prompt"], entry.get("image", [])
        pictures = [path.parent / one for one in ([images] if isinstance(images, str) else images)]
        if not isinstance(prompt, str):
            raise TypeError("a prompt is text")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"prompts: expected a JSON object with a prompt in line {number} of {path}, got {line!r}"
        ) from error
    return pictures, prompt


def _verdict(result: "Comparison", model: "SpecVLM") -> str:
    found = result.divergence
    if found is None:
        return f"equal, {result.tokens} tokens, tau {result.tau:.2f}"
    expected, got = (
        "the end" if token is None else f"{token} {model.processor.tokenizer.decode([token])!r}"
        for token in (found.expected, found.got)
    )
    gap = "" if found.gap is None else f", {found.gap:.3g} apart in logits"
    return f"differs at token {found.index}: {expected} by AR, {got} with the draft{gap}"


def _print_json(found: dict[str, Any]) -> None:
    print(json.dumps(found))
