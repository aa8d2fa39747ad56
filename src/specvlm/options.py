"""Command lines: options made of dataclasses' fields, and what a user got wrong as one line and exit status 2."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

#: Exit statuses.
BAD_INPUT, INTERRUPTED = 2, 130

#: What typer raises for a command line that it cannot read, whether its click is its own or the package.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def run(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs `app`, called `name`, and exits: with 2, after one line, for what a user got wrong.

    Args:
        arguments: of the command line; None: those that the process was started with.
    """
    try:
        status = app(args=arguments, prog_name=name, standalone_mode=False)
    except typer.Abort:
        status = INTERRUPTED
    except _UsageError as error:
        status = _complain(error.format_message())  # type: ignore[attr-defined]
    except (ValueError, TypeError, OSError) as error:
        status = _complain(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported before there is work for it
            raise
        status = _complain(f"memory: expected enough for the model and its answer, got {error}")
    sys.exit(status)


def _complain(problem: str) -> int:
    print("error:", " ".join(problem.split()), file=sys.stderr)
    return BAD_INPUT


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Makes options of the fields of every parameter that is a dataclass.

    Names, types and defaults are the fields', help is their metadata's; where the parameter has a default itself, its
    fields are the options' defaults. The dataclass is built, and so checked, before `command` runs.
    """
    configs: dict[str, Any] = {name: hint for name, hint in get_type_hints(command).items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        made = parameter.name in configs
        parameters += _options(configs[parameter.name], parameter.default) if made else [parameter]

    @functools.wraps(command)
    def called(**values: Any) -> Any:
        built = {
            name: config(**{one.name: values.pop(one.name) for one in fields(config)})
            for name, config in configs.items()
        }
        return command(**built, **values)

    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    called.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _options(config: Any, defaults: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(config)
    for one in sorted(fields(config), key=lambda one: one.default is not MISSING):  # those that have to be given first
        # An option that may be given again is a list to typer.
        hint = list[str] | None if hints[one.name] == tuple[str, ...] | None else hints[one.name]
        own = inspect.Parameter.empty if one.default is MISSING else one.default
        yield inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=own if defaults is inspect.Parameter.empty else getattr(defaults, one.name),
            annotation=Annotated[hint, typer.Option(help=one.metadata["help"])],
        )
