"""`qwen-on-ray plan` and `compile` as people call them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import cli
from cluster.plan_command import read_arguments
from engine.errors import ConfigError

ROOT = Path(__file__).parents[2]
NARROW = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("qwen-on-ray"), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(NARROW))
    arguments = {
        "model_path": str(tmp_path),
        "device": "tpu",
        "max_running_requests": 8,
        "chunked_prefill_size": 256,
        "max_total_tokens": 65536,
    }
    document = {"applications": [{"name": "qwen", "args": arguments}]}
    path = tmp_path / "serve.yaml"
    path.write_text(json.dumps(document))  # JSON is YAML
    return path


def test_a_plan_is_json_for_machines_and_a_plot(tmp_path: Path, config_file: Path) -> None:
    plot = tmp_path / "plan.png"
    done = run("plan", str(config_file), "--json", "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["tpu"] == "v6e:1x1"
    assert plan["num_tokens"] == 65536
    assert [step["num_chunk_tokens"] for step in plan["steps"]] == [0, 256]
    assert plan["steps"][0]["facts"]["num_kernels"] == 1
    assert 0 < plan["tpot_s"]["best"] < plan["tpot_s"]["worst"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "compiling for v6e:1x1: 4/4" in done.stderr


@pytest.mark.long
def test_programs_compiled_for_a_slice_are_written_with_what_their_keys_are_made_of(
    tmp_path: Path, config_file: Path
) -> None:
    store = tmp_path / "programs"
    done = run("compile", str(config_file), "--output", f"file://{store}")
    assert done.returncode == 0, done.stderr
    assert "4 programs" in done.stdout
    assert len(list((store / "executables").iterdir())) == 4
    parts = json.loads((store / "programs.json").read_text())["parts"]
    assert "libtpu" in parts["packages"]
    assert "TPU v6 lite" in parts["devices"]
    # Nothing of the machine that compiled.
    assert set(parts) == {"code", "packages", "settings", "variables", "devices", "model"}


def test_too_little_memory_is_one_sentence_with_the_flag(config_file: Path) -> None:
    refused = run("plan", str(config_file), "--mem-fraction-static", "0.00001")
    assert refused.returncode == 1
    (line,) = (line for line in refused.stderr.splitlines() if line.startswith("qwen-on-ray"))
    assert "--mem-fraction-static" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "--chip", "v9"], "v9"),
        (["plan", "--model-path", "m", "--topology", "2"], "v6e:2x2"),
        (["plan", "--model-path", "m", "--tp-size", "3"], "--topology"),
        (["plan", "--model-path", "m", "--input-len", "0"], "--input-len"),
        (["plan", "--model-path", "m", "--device", "cpu"], "--device=tpu"),
        (["plan", "--model-pth", "m"], "--model-path"),
        (["compile", "--model-path", "m"], "--output"),
    ],
)
def test_what_cannot_work_is_said_before_anything_compiles(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    try:
        status = cli.main(words)
    except SystemExit as stopped:
        status = stopped.code
    assert status in (1, 2)
    assert said in capsys.readouterr().err


def test_an_application_is_chosen_by_name(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(
        "applications:\n  - name: a\n    args: {model_path: x}\n"
        "  - name: b\n    args: {model_path: y}\n"
    )
    assert read_arguments(path, "b") == {"model_path": "y"}
    with pytest.raises(ConfigError, match="a, b"):
        read_arguments(path, None)
    path.write_text("model_path: x")
    with pytest.raises(ConfigError, match="no applications"):
        read_arguments(path, None)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_arguments(tmp_path / "none.yaml", None)
