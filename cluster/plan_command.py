"""`qwen-on-ray plan` and `qwen-on-ray compile`: what serving on a TPU would take, without a TPU.

Reads a Serve YAML file or flags, has the engine's programs compiled (`engine.compile_ahead`), and
prints what `engine.planner` makes of them. Knows neither Ray nor a model.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import yaml
from tqdm import tqdm

from cluster.cli import add_engine_flags, explain_unknown
from cluster.plan_report import compare_plans, describe_plan, import_pyplot, plot_plans
from engine.compile_ahead import Progress, compile_ahead, compile_here
from engine.config import EngineConfig, parse_config
from engine.errors import ConfigError, QwenOnRayError
from engine.planner import ServingPlan, Workload, make_plan
from engine.tpu_slice import GENERATIONS, Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What a command line asks for.

    Attributes:
        config: The engine's.
        tpu: The slice to compile for; None where the configuration is for another device.
        values: The flags that are the command's own.
    """

    config: EngineConfig
    tpu: Slice | None
    values: argparse.Namespace


def plan_main(argv: Sequence[str]) -> int:
    """Run `qwen-on-ray plan`; the exit status."""
    parser = _make_parser(
        "plan",
        "Say what serving a model on a TPU slice would take and give: memory, steps, times. "
        "Compiles the programs that serving would run; needs no TPU.",
    )
    parser.add_argument(
        "--input-len",
        type=_positive,
        default=512,
        metavar="INT",
        help="Prompt tokens of a request. Default: 512.",
    )
    parser.add_argument(
        "--output-len",
        type=_positive,
        default=128,
        metavar="INT",
        help="Generated tokens of a request. Default: 128.",
    )
    parser.add_argument(
        "--concurrency",
        type=_positive,
        default=8,
        metavar="INT",
        help="Requests at a time. Default: 8.",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="SLICE",
        help="More slices to plan for, as in v6e:2x4 v5e:2x4.",
    )
    parser.add_argument("--json", action="store_true", help="JSON in place of tables.")
    parser.add_argument(
        "--plot", metavar="FILE", help="Draw memory and steps into a PNG, SVG or PDF file."
    )
    return _run(parser, argv, _plan)


def compile_main(argv: Sequence[str]) -> int:
    """Run `qwen-on-ray compile`; the exit status."""
    parser = _make_parser(
        "compile",
        "Compile every program that serving would run, ahead of time, into a folder or a bucket; "
        "serve with --compiled-programs, and hosts start by loading. Needs no TPU.",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR|ADDRESS",
        help="Where programs go: a folder, or an address such as gs://bucket/qwen7b.",
    )
    return _run(parser, argv, _compile)


def _run(parser: argparse.ArgumentParser, argv: Sequence[str], action: Any) -> int:
    try:
        return action(_read_command(parser, argv))
    except QwenOnRayError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


# Reading ------------------------------------------------------------------------------------------


def _make_parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"qwen-on-ray {name}",
        usage=f"qwen-on-ray {name} [CONFIG.yaml] [flags]",
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    parser.add_argument(
        "file",
        nargs="?",
        metavar="CONFIG.yaml",
        help="A file for `serve run`; flags change what it says.",
    )
    parser.add_argument(
        "--application",
        metavar="NAME",
        help="Which of the file's applications. Default: its only one.",
    )
    parser.add_argument(
        "--chip", choices=sorted(GENERATIONS), default="v6e", help="TPU generation. Default: v6e."
    )
    parser.add_argument(
        "--topology",
        metavar="SHAPE",
        help="The slice, as in 2x4 or v6e:2x4; sets --tp-size. Default: --tpu, else the usual "
        "one with --tp-size devices.",
    )
    add_engine_flags(parser.add_argument_group("flags of the engine, as for serving"))
    return parser


def _read_command(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Command:
    values, unknown = parser.parse_known_args(list(argv))
    for word in unknown:
        parser.error(explain_unknown(word))
    given = {
        name: getattr(values, name) for name in EngineConfig.model_fields if hasattr(values, name)
    }
    if values.file is not None:
        given = {**read_arguments(Path(values.file), values.application), **given}
    if given.get("device") in ("cpu", "gpu"):
        return Command(config=parse_config(given), tpu=None, values=values)
    if values.topology:
        is_whole = ":" in values.topology
        tpu = Slice.parse(values.topology if is_whole else f"{values.chip}:{values.topology}")
        given = on_slice(given, tpu)
    config = parse_config({**given, "device": "tpu"})
    tpu = config.tpu_slice or Slice.of_devices(values.chip, config.tp_size)
    return Command(config=config, tpu=tpu, values=values)


def on_slice(given: Mapping[str, Any], tpu: Slice) -> dict[str, Any]:
    """The same engine over all devices of a slice."""
    others = {name: given[name] for name in given if name not in ("tp_size", "nnodes")}
    return {**others, "tpu": str(tpu), "node_rank": 0, "dist_init_addr": None}


def read_arguments(path: Path, application: str | None) -> dict[str, Any]:
    """Read the `args:` of an application out of a file for `serve run`.

    Raises:
        ConfigError: There is no such file, or no such application in it.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    listed = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise ConfigError(
            f"{path} has no applications: it is no file for `serve run`. configs/ has examples."
        )
    by_name = {str(each.get("name", "")): each.get("args") or {} for each in listed}
    if application is None and len(by_name) == 1:
        return dict(next(iter(by_name.values())))
    if application not in by_name:
        raise ConfigError(
            f"{path} has the applications {', '.join(by_name)}; choose one with --application."
        )
    return dict(by_name[application])


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of tokens or requests, 1 or more"
        )
    return int(text)


# Planning -----------------------------------------------------------------------------------------


def _plan(command: Command) -> int:
    values, config = command.values, command.config
    if command.tpu is None:
        raise ConfigError(
            f"--device={config.device} cannot be planned: only the compiler for TPUs tells times. "
            "Give --device=tpu."
        )
    workload = Workload(
        input_len=values.input_len, output_len=values.output_len, concurrency=values.concurrency
    )
    if values.plot:
        import_pyplot()
    slices = list(dict.fromkeys([command.tpu, *map(Slice.parse, values.compare)]))
    plans: list[ServingPlan] = []
    pages: list[str] = []
    faults: dict[str, str] = {}
    for tpu in slices:
        own = config
        if tpu != command.tpu:
            fields = config.model_dump(exclude_unset=True)
            own = parse_config(on_slice(fields, tpu))
        try:
            with _progress(f"{tpu}") as on_progress:
                compiled = compile_ahead(own, tpu, on_progress=on_progress)
        except QwenOnRayError as error:
            if len(slices) == 1:
                raise
            faults[str(tpu)] = str(error)
            continue
        plans.append(make_plan(own, compiled, workload))
        pages.append(describe_plan(plans[-1], own))
    if values.json:
        found = [plan.as_json() for plan in plans] + [
            {"tpu": tpu, "error": error} for tpu, error in faults.items()
        ]
        print(json.dumps(found[0] if len(slices) == 1 else found, indent=1))
    else:
        print("\n".join(pages))
        if len(slices) > 1:
            print(compare_plans(plans, faults))
    if values.plot and plans:
        plot_plans(plans, Path(values.plot))
        print(f"Plot: {values.plot}", file=sys.stderr)
    return 0 if plans else 1


# Compiling ahead ----------------------------------------------------------------------------------


def _compile(command: Command) -> int:
    output = command.values.output
    is_address = "://" in output
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if is_address else Path(output).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with _progress(str(command.tpu or command.config.device)) as on_progress:
            if command.tpu is None:
                num_programs = compile_here(command.config, folder, on_progress)
            else:
                compiled = compile_ahead(
                    command.config, command.tpu, store=folder, on_progress=on_progress
                )
                num_programs = len(compiled.programs)
        if is_address:
            _upload(folder, output)
    print(
        f"{num_programs} programs in {output}. Serve them with --compiled-programs={output}, the "
        "same flags, and the same versions of this project, JAX and libtpu."
    )
    return 0


def _upload(folder: Path, address: str) -> None:
    try:
        files, root = fsspec.core.url_to_fs(address)
        files.makedirs(root, exist_ok=True)
        files.put(f"{folder}/", f"{root}/", recursive=True)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"--output={address} cannot be written: {error}") from error


@contextmanager
def _progress(subject: str) -> Iterator[Progress]:
    """A bar on a terminal, lines elsewhere."""
    is_terminal = sys.stderr.isatty()
    bar = tqdm(disable=not is_terminal, unit="program", desc=f"compiling for {subject}")

    def report(done: int, total: int, note: str) -> None:
        bar.total = total
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)
        bar.refresh()
        if not is_terminal:
            print(f"compiling for {subject}: {done}/{total} {note}", file=sys.stderr, flush=True)

    try:
        yield report
    finally:
        bar.close()
