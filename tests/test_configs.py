"""Every file in configs/ is one that `serve run` and the engine accept."""

import importlib.util
import shlex
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.cli import parse_command_line
from engine.config import EngineConfig, parse_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def read_args(path: Path) -> dict:
    (application,) = yaml.safe_load(path.read_text())["applications"]
    return application["args"]


def head_comment(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return [line.removeprefix("#").strip() for line in lines[: lines.index("http_options:")]]


def test_all_promised_configs_are_there():
    assert {path.name for path in CONFIGS} >= {
        "demo-cpu.yaml",
        "qwen2.5-0.5b-cpu.yaml",
        "qwen7b.yaml",
        "qwen2.5-7b.yaml",
        "qwen3-8b.yaml",
        "qwen3-32b-v6e-16.yaml",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_file_is_valid_for_serve_and_for_the_engine(path: Path):
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    (application,) = schema.applications
    assert application.route_prefix == "/"

    module, _, name = application.import_path.partition(":")
    assert importlib.util.find_spec(module), f"{module} cannot be imported"
    assert name == "build"
    parse_config(read_args(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_file_opens_with_command_hardware_and_expectation(path: Path):
    words = [line.split(maxsplit=1)[0] for line in head_comment(path) if line]
    assert [word for word in words if word in ("command", "hardware", "expect")] == [
        "command",
        "hardware",
        "expect",
    ]
    assert f"configs/{path.name}" in path.read_text()


@pytest.mark.parametrize("name", ["qwen7b", "qwen3-32b-v6e-16"])
def test_command_line_in_the_comment_means_the_same_as_the_args(name: str):
    path = next(path for path in CONFIGS if path.stem == name)
    lines = head_comment(path)
    first = next(i for i, line in enumerate(lines) if line.startswith("python -m serve_app"))
    command = ""
    for line in lines[first:]:
        command += line.removesuffix("\\")
        if not line.endswith("\\"):
            break
    command = command.replace("<0 to 3>", "0").replace("<rank 0's address>", "10.0.0.2")
    flags = shlex.split(command)[3:]

    # Where the cluster forms is the command line's business alone: under `ray up` it has formed.
    own = {"dist_init_addr"}
    from_flags = parse_command_line(flags).config.model_dump(exclude=own)
    assert from_flags == EngineConfig(**read_args(path)).model_dump(exclude=own)
