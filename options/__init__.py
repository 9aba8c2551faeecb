"""What a user may say: options as dataclasses, and UserError for what was said wrong."""

import dataclasses
import inspect
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings
from jsonargparse.typing import restricted_number_type

O = TypeVar("O")

PositiveInt = restricted_number_type("Count", int, [(">", 0), ("<=", 1_000_000_000)])
NonNegativeInt = restricted_number_type("CountOrZero", int, [(">=", 0), ("<=", 2**63 - 1)])
HalfOpenUnit = restricted_number_type("HalfOpenUnit", float, [(">=", 0), ("<", 1)])


_SAID = "_said"  # where parse keeps the names of what was said


class UserError(ValueError):
    """Bad input. The message is one line: the option or file, the value, what is allowed; what to try."""

    @property
    def problem(self) -> str:
        """The message without advice that names options: for a script that lacks them."""
        first, *advice = str(self).split("; ")
        return "; ".join([first, *(part for part in advice if "--" not in part)])


class Interrupted(KeyboardInterrupt):
    """The process was told to stop by a signal; `code` is the exit code that shells expect: 130 SIGINT, 143 SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


def first_process() -> bool:
    """Whether this is the first of the processes that torchrun has started, or alone."""
    return "MASTER_ADDR" not in os.environ or os.environ.get("RANK", "0") == "0"


class _Parser(ArgumentParser):
    """Errors are one line on standard error and exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = re.sub(r'Parser key "(\w+)":', r"--\1:", " ".join(message.split()))
        if not first_process():
            raise SystemExit(2)  # the first one says it
        print(f"{self.prog}: error: {text} (see --help)", file=sys.stderr)
        raise SystemExit(2)


class _Formatter(DefaultHelpFormatter):
    """Help that keeps the lines of a text of several, such as a program, and folds those that are too long."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.strip().split("\n")
        return "\n".join(
            super(_Formatter, self)._fill_text(line, width, indent) if len(line) > width else line for line in lines
        )


def parse(options: type[O], argv: Sequence[str] | None, prog: str, description: str, epilog: str = "") -> O:
    """Read options from the command line and --config FILE.yaml, the command line winning.

    Args:
        options: a dataclass whose fields carry type, default and docstring; its check(), if any, raises
            UserError for values that do not go together.
        argv: the arguments without the program's name; None takes the process's own.
        prog, description, epilog: for --help.
    Raises:
        SystemExit: code 2 after a one-line error; 0 after --help or --print_config.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=prog, description=description, epilog=epilog, allow_abbrev=False, formatter_class=_Formatter)
    parser.usage = f"{prog} [--OPTION VALUE ...]"
    parser.add_argument("--config", action="config", help="a YAML file of options, e.g. options/presets/quick.yaml")
    parser.add_class_arguments(options)
    _group(parser, options)
    arguments = sys.argv[1:] if argv is None else list(argv)
    _check_config_files(parser, arguments)
    try:
        values = _values(options, parser.parse_args(arguments).as_dict())
    except UserError as error:
        parser.error(str(error))
    result = options(**values)
    said = parser.parse_args(arguments, defaults=False)
    result.__dict__[_SAID] = {name for name in values if said.get(name) is not None}
    try:
        if hasattr(result, "check"):
            result.check()
    except UserError as error:
        parser.error(str(error))
    return result


def _group(parser: _Parser, options: type[Any]) -> None:
    """In --help the options stand under the class that brought them, as its docstring begins."""
    owners: dict[str, type[Any]] = {}
    for kind in reversed(options.__mro__):
        for name in inspect.get_annotations(kind):
            owners.setdefault(name, kind)
    actions = {action.dest: action for group in parser._action_groups for action in group._group_actions}
    for group in parser._action_groups:
        group._group_actions = [action for action in group._group_actions if action.dest not in owners]
    for kind in dict.fromkeys(owners.values()):
        group = parser.add_argument_group((kind.__doc__ or "").strip().split("\n")[0].rstrip("."))
        group._group_actions += [actions[name] for name, owner in owners.items() if owner is kind]


def check_name(name: str) -> None:
    """Raise UserError where --name is not the name of a folder."""
    if not re.fullmatch(r"[^/\\\s][^/\\]*", name) or not name.isprintable() or name in (".", ".."):
        raise UserError(f"--name {name!r} is not the name of a folder: leave out slashes and line ends")


def part(text: str) -> tuple[int, int]:
    """K and N of --part K/N, the K-th of N processes; raises UserError."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not found or int(found[1]) > int(found[2]):
        raise UserError(f"--part {text} is none of 1/2, 2/2, 1/3, ...")
    return int(found[1]), int(found[2])


def given(opt: Any) -> set[str]:
    """The names of the options that were said, on the command line or in a file."""
    return set(
        vars(opt).get(_SAID, {name for name, value in to_dict(opt).items() if value != to_dict(type(opt)())[name]})
    )


def _values(options: type[Any], parsed: Mapping[str, Any]) -> dict[str, Any]:
    """What was parsed, by field; raises UserError for what the parser takes though it is none: empty text, null."""
    hints = get_type_hints(options)
    values = {field.name: _plain(parsed[field.name]) for field in dataclasses.fields(options)}
    for name, value in values.items():
        if value == "" or (value is None and type(None) not in get_args(hints[name])):
            raise UserError(f"--{name} is {'null' if value is None else 'empty'}; leave it out, or give a value")
    return values


def _plain(value: Any) -> Any:
    """jsonargparse's restricted numbers as ordinary ones, which YAML and checkpoints take."""
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


def _check_config_files(parser: _Parser, arguments: Sequence[str]) -> None:
    """Name the file and the place where a --config cannot be read; jsonargparse's own text is a page long."""
    for index, argument in enumerate(arguments):
        if argument.partition("=")[0] != "--config":
            continue
        name = argument.partition("=")[2] if "=" in argument else " ".join(arguments[index + 1 : index + 2])
        try:
            content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            parser.error(f"--config {name}: no such file; the presets are in options/presets/")
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--config {name} cannot be read: {error}")
        except yaml.YAMLError as error:
            parser.error(f"--config {name} is not YAML: {error}")
        if not isinstance(content, dict):
            parser.error(f"--config {name} holds no `option: value` lines")


def save(options: Any, path: Path, head: str) -> None:
    """Write the resolved options as YAML that --config reads back; `head` becomes its first comment line."""
    text = yaml.dump(to_dict(options), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(f"# {head}\n{text}", encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def heads(path: Path) -> list[str]:
    """The first two lines of such a file: how to run it again, the machine it began on; fewer where there are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    return [line.removeprefix("# ") for line in lines[:2] if line.startswith("# ")]


class _Dumper(yaml.SafeDumper):
    """Text that a reader might take for a number is quoted: jsonargparse reads more of these than YAML does."""


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    numeral = re.fullmatch(r"[-+.0-9_xobeEa-fA-F:]+|[-+]?\.?(inf|nan)", text, re.IGNORECASE)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if numeral else None)


_Dumper.add_representer(str, _text)


def to_dict(options: Any) -> dict[str, Any]:
    """The options as plain containers, tuples as lists: what checkpoints and YAML hold."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(options).items()
    }


class _Strict(_Parser):
    """Errors are UserErrors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(" ".join(message.split()))


def restore(options: type[O], stored: Mapping[str, Any]) -> O:
    """The options that a checkpoint holds (to_dict); what this version does not know is left out.

    Raises:
        UserError: a value is none that could have been given.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Strict()
    parser.add_class_arguments(options)
    known = {field.name: stored[field.name] for field in dataclasses.fields(options) if field.name in stored}  # type: ignore[arg-type]
    try:
        parsed = parser.parse_object(known)
    except (TypeError, KeyError, AttributeError, OverflowError) as error:  # of things that are no options at all
        raise UserError(f"an option has a value of the wrong kind ({error})") from None
    return options(**_values(options, parsed.as_dict()))


def in_words(error: OSError) -> str:
    """What the system refused, and for which file."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused, by Python, PyTorch's allocator of the CPU or a GPU."""
    names = {kind.__name__ for kind in type(error).__mro__}
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or any(word in str(error) for word in words)


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """What an error was made of, if that is one: the interpreter and compiled modules do so in imports."""
    importing = isinstance(error, ImportError | SystemError)  # whose cause may be no more than their context
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or (error.__context__ if importing else None)
    return error


def entry(main: Callable[[], Any]) -> None:
    """Run a script's main as a program: bad input is one line and exit code 2, Ctrl-C is 130, SIGTERM 143."""
    name = Path(sys.argv[0]).name + ("" if first_process() else f" (process {os.environ['RANK']})")
    if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _interrupted)
    for stream in (sys.stdout, sys.stderr):  # a name that the console cannot show does not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        except Exception as error:
            if stop := _interruption(error):
                raise stop from None
            raise
    except UserError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # who read what was printed has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        print(f"{name}: error: {in_words(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"{name}: error: out of memory", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        if first_process():
            print("; ".join([f"\n{name}: interrupted", *getattr(error, "__notes__", [])]), file=sys.stderr)
        raise SystemExit(getattr(error, "code", 130)) from None
