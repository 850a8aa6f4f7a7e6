"""The command line against `EngineConfig`: same names, same faults, and no key left behind."""

import hashlib
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import cli
from engine.config import EngineConfig

SEED_COMMAND = (
    "--model-path Qwen/Qwen-7B-Chat --trust-remote-code --dist-init-addr=0.0.0.0:10011 --nnodes=1 "
    "--tp-size=4 --device=tpu --random-seed=3 --node-rank=0 --mem-fraction-static=0.2 "
    "--max-prefill-tokens=8192 --download-dir=/tmp "
    "--jax-precompile-prefill-token-paddings 16384 --dtype=bfloat16 --skip-server-warmup "
    "--attention-backend=fa --page-size=64"
)


def test_seed_command_line_is_read_flag_for_flag():
    line = cli.parse_command_line(SEED_COMMAND.split())

    assert line.config == EngineConfig(
        model_path="Qwen/Qwen-7B-Chat",
        trust_remote_code=True,
        dist_init_addr="0.0.0.0:10011",
        nnodes=1,
        tp_size=4,
        device="tpu",
        random_seed=3,
        node_rank=0,
        mem_fraction_static=0.2,
        max_prefill_tokens=8192,
        download_dir="/tmp",
        jax_precompile_prefill_token_paddings=(16384,),
        dtype="bfloat16",
        skip_server_warmup=True,
        attention_backend="fa",
        page_size=64,
    )
    assert line.port == 30000


def test_every_field_has_a_flag_with_help():
    help_text = " ".join(cli.make_parser("prog").format_help().split())
    for name, field in EngineConfig.model_fields.items():
        assert cli.flag_name(name) in help_text
        assert (field.description or "-").split(".")[0] in help_text


def test_flags_not_given_keep_the_defaults_of_the_config():
    assert cli.parse_command_line(["--model-path", "m"]).config == EngineConfig(model_path="m")


def test_boolean_flags_have_a_negative_form():
    line = cli.parse_command_line(["--model-path", "m", "--no-enable-prefix-caching"])
    assert not line.config.enable_prefix_caching


def test_list_flags_take_several_values():
    words = ["--model-path", "m", "--jax-precompile-prefill-token-paddings", "64", "128"]
    assert cli.parse_command_line(words).config.jax_precompile_prefill_token_paddings == (64, 128)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tp-siz=4"], "unknown flag --tp-siz. Did you mean --tp-size?"),
        (["--mem-fraction=0.2"], "Did you mean --mem-fraction-static?"),
        (["stray"], "unexpected 'stray'"),
        (["--page-size=7"], "--page-size=7"),
        (["--tp-size=four"], "--tp-size='four'"),
        (["--tp-size=4", "--nnodes=3"], "Use a multiple of 3"),
        (["--port=http"], "--port=http is not a port number"),
        (["--api-key=a", "--api-key-file=b"], "exclude each other"),
    ],
)
def test_flags_that_cannot_work_end_at_once_and_say_why(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse_command_line(["--model-path=m", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_model_path_is_asked_for_by_its_flag(capsys):
    with pytest.raises(SystemExit):
        cli.parse_command_line([])
    assert "--model-path is required" in capsys.readouterr().err


def test_api_key_is_hashed_into_a_file_that_only_its_owner_reads(tmp_path):
    path = cli.write_api_key_file(["secret", "other"], tmp_path / "keys")

    assert sorted(path.read_text().split()) == sorted(
        hashlib.sha256(key.encode()).hexdigest() for key in ("secret", "other")
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert cli.write_api_key_file(["other", "secret"], tmp_path / "keys") == path


@pytest.mark.parametrize("flag", [["--api-key", "secret"], ["--api-key=secret"]])
def test_api_key_leaves_the_arguments(flag, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = cli.replace_api_keys(["python", "-m", "serve_app", *flag, "--model-path", "m"])

    assert words is not None
    assert not any("secret" in word for word in words)
    key_file = Path(words[words.index("--api-key-file") + 1])
    assert key_file.read_text().strip() == hashlib.sha256(b"secret").hexdigest()
    assert cli.replace_api_keys(words) is None


@pytest.mark.parametrize("own", [["--api-key-file", "mine"], ["--api-key-file=mine"]])
def test_api_key_does_not_replace_a_key_file(own, tmp_path):
    words = ["--model-path", "m", *own, "--api-key=secret"]
    done = subprocess.run(
        [sys.executable, "-m", "serve_app", *words],
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 2
    assert "--api-key and --api-key-file exclude each other" in done.stderr


def test_console_script_names_its_commands_and_the_nearest_one(capsys):
    assert cli.main(["--help"]) == 0
    assert "serve" in capsys.readouterr().out
    assert cli.main(["server"]) == 2
    assert "Did you mean serve?" in capsys.readouterr().err


def test_help_needs_neither_ray_nor_jax():
    program = (
        "import sys; from cluster.cli import main; main(['serve', '--help']); "
        "assert not {'ray', 'jax'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--mem-fraction-static" in done.stdout
