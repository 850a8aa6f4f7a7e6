"""The command line: flags out of `EngineConfig`'s fields, and the `qwen-on-ray` script.

A flag is a field's name with dashes; type, default, bounds and help are the field's own. Knows
nothing of what a flag does. Ray is imported only to serve, so that `--help` is quick.
"""

import argparse
import difflib
import hashlib
import importlib
import os
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo

from engine.config import EngineConfig, parse_config
from engine.errors import ConfigError

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 30000

COMMANDS = {
    "serve": "Serve a model behind an OpenAI-compatible API.",
    "status": "Say how each engine of a running cluster is, and how far its start has come.",
    "plan": "Say what serving a model on a TPU slice would take and give; needs no TPU.",
    "compile": "Compile a model's programs ahead of time; needs no TPU.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """What a command line asks for.

    Attributes:
        config: The engine, as `args:` of a YAML file would describe it.
        host: Address that HTTP listens on.
        port: Port that HTTP listens on.
    """

    config: EngineConfig
    host: str
    port: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `qwen-on-ray` console script."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else "--help"
    if command in ("-h", "--help"):
        print("usage: qwen-on-ray COMMAND [flags]\n\ncommands:")
        for name, help_line in COMMANDS.items():
            print(f"  {name:<10}{help_line}")
        print("\nqwen-on-ray COMMAND --help lists its flags.")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(
            f"qwen-on-ray: unknown command {command}.{hint} Known: {', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        return 2
    if command in ("plan", "compile"):
        # They bring JAX, and a compiler.
        module = importlib.import_module("cluster.plan_command")
        return {"plan": module.plan_main, "compile": module.compile_main}[command](words[1:])
    if command == "status":
        return importlib.import_module("cluster.status_command").status_main(words[1:])
    if "-h" in words or "--help" in words:
        make_parser(f"qwen-on-ray {command}").print_help()
        return 0
    # The composition root stands above this layer and brings Ray with it: only now is it wanted.
    return importlib.import_module("serve_app").main(words[1:])


def parse_command_line(argv: Sequence[str], *, prog: str = "python -m serve_app") -> CommandLine:
    """Read flags, without the program's name. An `--api-key` is replaced by a file of its hash.

    Raises:
        SystemExit: With status 2 and a message on stderr for flags that cannot work, the nearest
            valid name among it; with status 0 after `--help`.
    """
    parser = make_parser(prog)
    values, unknown = parser.parse_known_args(list(argv))
    for word in unknown:
        parser.error(explain_unknown(word))
    given = vars(values)
    host, port = given.pop("host", DEFAULT_HOST), given.pop("port", DEFAULT_PORT)
    if not isinstance(port, int) or not 0 < port < 65536:
        parser.error(f"--port={port} is not a port number, 1 to 65535.")
    keys = given.pop("api_key", None)
    if keys:
        if "api_key_file" in given:
            parser.error("--api-key and --api-key-file exclude each other: keep the file.")
        given["api_key_file"] = str(write_api_key_file(keys))
    try:
        return CommandLine(config=parse_config(given), host=host, port=port)
    except ConfigError as error:
        parser.error(str(error))


def leave_no_key_in_the_process_list() -> None:
    """Start this process over without `--api-key` in its arguments, if it has any.

    Any user of the machine can read a process's arguments; the key's hash lies in a private file.
    Does not return where there was a key.
    """
    words = replace_api_keys(sys.orig_argv)
    if words is not None:
        os.execv(sys.executable, words)


def replace_api_keys(argv: Sequence[str]) -> list[str] | None:
    """Put `--api-key-file` in the place of every `--api-key`.

    Returns:
        None if there is nothing to do, or if both are there, which the parser refuses.
    """
    if any(word.partition("=")[0] == "--api-key-file" for word in argv):
        return None
    words: list[str] = []
    keys: list[str] = []
    remaining = iter(argv)
    for word in remaining:
        if word == "--api-key":
            keys += [key for key in [next(remaining, "")] if key]
        elif word.startswith("--api-key="):
            keys.append(word.partition("=")[2])
        else:
            words.append(word)
    if not keys:
        return None
    return [*words, "--api-key-file", str(write_api_key_file(keys))]


def write_api_key_file(keys: Sequence[str], directory: Path | None = None) -> Path:
    """Write the SHA-256 hash of each key to a file that only this user can read.

    The same keys give the same path, so that a cluster whose hosts are started with one and the
    same command line has the file on each of them.
    """
    hashes = sorted(hashlib.sha256(key.encode()).hexdigest() for key in keys)
    name = hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
    directory = directory or Path.home() / ".config" / "qwen-on-ray" / "api-keys"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / name
    path.touch(mode=0o600)
    path.write_text("".join(f"{line}\n" for line in hashes))
    return path


def make_parser(prog: str) -> argparse.ArgumentParser:
    """Make a parser of every field of `EngineConfig`, and of HTTP's address.

    Flags that are not given are left out of the result, so that defaults stay in one place.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} --model-path MODEL [flags]",
        description="Serve a Qwen model behind an OpenAI-compatible API.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    add_engine_flags(parser)
    parser.add_argument(
        "--host",
        help="Address that HTTP listens on; 0.0.0.0 lets other machines in. "
        f"Default: {DEFAULT_HOST}.",
    )
    parser.add_argument(
        "--port",
        type=_number_or_text,
        metavar="INT",
        help=f"Port that HTTP listens on. Default: {DEFAULT_PORT}.",
    )
    parser.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="Key that clients must send. Hashed into a private file, as --api-key-file wants it.",
    )
    return parser


def add_engine_flags(parser: argparse._ActionsContainer) -> None:
    """Add a flag for every field of `EngineConfig`; what is not given is left out of the result."""
    for name, field in EngineConfig.model_fields.items():
        parser.add_argument(
            flag_name(name), help=help_line(field), default=argparse.SUPPRESS, **_argument(field)
        )


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def help_line(field: FieldInfo) -> str:
    """Help of a field as the parser shows it, default included."""
    text = (field.description or "").replace("%", "%%")
    if field.is_required():
        return f"{text} Required."
    if field.default is None or field.default == () or "Default:" in text:
        return text
    default = field.default
    shown = ("on" if default else "off") if isinstance(default, bool) else default
    return f"{text} Default: {shown}."


def type_name(field: FieldInfo) -> str:
    """What a flag takes, in the words of the help and of docs/flags.md."""
    kind = _without_none(field.annotation)
    if typing.get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "INT [INT ...]"
    return {bool: "flag", int: "INT", float: "NUMBER", str: "TEXT"}[kind]


def _argument(field: FieldInfo) -> dict[str, Any]:
    kind = _without_none(field.annotation)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is tuple:
        return {"nargs": "+", "type": _number_or_text, "metavar": "INT"}
    is_text = kind is str
    return {"type": str if is_text else _number_or_text, "metavar": type_name(field)}


def _number_or_text(text: str) -> int | float | str:
    """Convert if possible; what is no number is left for the config's own message."""
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return kinds[0]
    return annotation


def explain_unknown(word: str) -> str:
    """What to say of a word that is no flag."""
    if not word.startswith("-"):
        return f"unexpected {word!r}: every argument needs its flag, as in --model-path {word}"
    flag = word.partition("=")[0]
    known = [flag_name(name) for name in EngineConfig.model_fields]
    known += ["--host", "--port", "--api-key"]
    near = difflib.get_close_matches(flag, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else " --help lists the flags."
    return f"unknown flag {flag}.{hint}"
