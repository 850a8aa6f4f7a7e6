"""Safetensors → sharded arrays: the right rows, every fault named, and no more read than needed."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from model_harness import DATA, LoadedModel, max_difference
from safetensors.numpy import load_file, save_file

from engine.errors import CheckpointError
from engine.models import checkpoint
from engine.models.checkpoint import dummy_weights, load_weights
from engine.models.config import load_model_config
from engine.models.registry import model_layout
from engine.models.safetensors_files import find_tensors
from engine.sharding import make_mesh

QWEN2 = DATA / "tiny-qwen2"


def flat(params: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A checkpoint that the test may break."""
    return shutil.copytree(QWEN2, tmp_path / "copied")


def rewrite(directory: Path, changes: dict[str, np.ndarray | None]) -> None:
    tensors = load_file(directory / "model.safetensors") | changes
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        directory / "model.safetensors",
    )


def load(directory: Path, tp_size: int = 1, dtype: str = "float32", **options: Any) -> Any:
    return load_weights(
        directory, load_model_config(directory), make_mesh(tp_size), dtype, **options
    )


def test_sharded_files_give_the_arrays_of_a_single_one(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for part in range(3):
        file_name = f"model-{part + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[part::3]}, copied / file_name)
        weight_map |= dict.fromkeys(names[part::3], file_name)
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    single, several = flat(load(QWEN2)), flat(load(copied))
    assert single.keys() == several.keys()
    assert all(np.array_equal(single[name], several[name]) for name in single)


def test_a_checkpoint_that_was_saved_without_its_head_is_read_as_well(tmp_path: Path) -> None:
    tied = DATA / "tiny-qwen2-tied"
    headless = shutil.copytree(tied, tmp_path / "headless")
    tensors = load_file(tied / "model.safetensors")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
        headless / "model.safetensors",
    )
    expected, got = flat(load(tied)), flat(load(headless))
    assert expected.keys() == got.keys()
    assert all(np.array_equal(expected[name], got[name]) for name in expected)


def test_fused_tensors_are_cut_into_their_parts() -> None:
    tensors = load_file(DATA / "tiny-qwen1" / "model.safetensors")
    layer = load(DATA / "tiny-qwen1", 2)["layers"][1]
    fused = tensors["transformer.h.1.attn.c_attn.weight"]
    for part, name in enumerate(["q_proj", "k_proj", "v_proj"]):
        weight = np.asarray(layer["self_attn"][name]["weight"])
        assert np.array_equal(weight, fused[part * 64 : (part + 1) * 64])
    gate = np.asarray(layer["mlp"]["gate_proj"]["weight"])
    assert np.array_equal(gate, tensors["transformer.h.1.mlp.w2.weight"])


@pytest.mark.parametrize("tp_size", [3, 4])
def test_padded_heads_and_rows_are_zero_and_the_rest_is_in_its_place(tp_size: int) -> None:
    config = load_model_config(QWEN2)
    layout = model_layout(config, tp_size)
    tensors = load_file(QWEN2 / "model.safetensors")
    o_proj = np.asarray(load(QWEN2, tp_size)["layers"][0]["self_attn"]["o_proj"]["weight"])
    assert o_proj.shape == (64, layout.padded_size("heads"))
    expected = tensors["model.layers.0.self_attn.o_proj.weight"]
    for column, source in enumerate(layout.rows["heads"]):
        if source < 0:
            assert not o_proj[:, column].any()
        else:
            assert np.array_equal(o_proj[:, column], expected[:, source])


def test_weights_are_sharded_and_converted(copied: Path) -> None:
    params = load(copied, 4, "bfloat16")
    q_proj = params["layers"][2]["self_attn"]["q_proj"]["weight"]
    assert q_proj.dtype == ml_dtypes.bfloat16
    assert {shard.data.shape for shard in q_proj.addressable_shards} == {(16, 64)}
    assert len(params["norm"]["weight"].addressable_shards) == 4


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_files_are_read(copied: Path, stored: str) -> None:
    dtype = np.dtype(ml_dtypes.bfloat16 if stored == "bfloat16" else np.float16)
    tensors = load_file(copied / "model.safetensors")
    rewrite(copied, {name: tensor.astype(dtype) for name, tensor in tensors.items()})
    weight = np.asarray(load(copied)["lm_head"]["weight"])
    assert np.array_equal(weight, tensors["lm_head.weight"].astype(dtype).astype(np.float32))


def test_missing_surplus_and_misshapen_tensors_are_reported_together(copied: Path) -> None:
    rewrite(
        copied,
        {
            "model.layers.1.mlp.up_proj.weight": None,
            "model.norm.weight": np.zeros(32, np.float32),
            "model.layers.7.mlp.up_proj.weight": np.zeros((128, 64), np.float32),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        load(copied)
    message = str(caught.value)
    assert "3 tensors" in message
    assert "missing: model.layers.1.mlp.up_proj.weight [128, 64]" in message
    assert "misshapen: model.norm.weight is [32], not [64]" in message
    assert "surplus: model.layers.7.mlp.up_proj.weight [128, 64]" in message


def test_a_long_list_of_faults_is_cut(copied: Path) -> None:
    save_file({"model.norm.weight": np.zeros(64, np.float32)}, copied / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        load(copied)


def test_a_tied_checkpoint_may_still_hold_lm_head(tmp_path: Path) -> None:
    directory = shutil.copytree(DATA / "tiny-qwen2-tied", tmp_path / "tied")
    rewrite(directory, {"lm_head.weight": np.zeros((512, 64), np.float32)})
    assert "lm_head" not in load(directory)


def test_pickles_are_refused_with_the_reason(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*can run\s+code"):
        load(copied)


def test_a_directory_without_weights_says_what_is_needed(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="--load-format=dummy"):
        load(copied)


def test_an_index_that_names_absent_files_says_which(copied: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        load(copied)


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, 700_000])
def test_a_file_that_was_cut_short_is_named(copied: Path, kept_bytes: int) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors"):
        load(copied)


def test_quantized_tensors_are_refused(copied: Path) -> None:
    rewrite(copied, {"model.norm.weight": np.zeros(64, np.int8)})
    with pytest.raises(CheckpointError, match="I8"):
        load(copied)


def test_progress_counts_the_bytes_on_the_devices(copied: Path) -> None:
    calls: list[tuple[int, int]] = []
    params = load(copied, 2, on_progress=lambda done, total: calls.append((done, total)))
    held = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
    )
    assert calls[-1] == (held, held)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_gathering_a_part_touches_only_its_pages(tmp_path: Path) -> None:
    """A quarter of a mapped tensor's rows is read: the kernel says how much of it is resident."""
    megabyte = 2**20
    matrix = np.arange(32 * megabyte // 4, dtype=np.float32).reshape(1024, -1)
    save_file({"weight": matrix}, tmp_path / "model.safetensors")
    mapped = find_tensors(tmp_path)["weight"].map()
    rows = [np.arange(256, 512), np.arange(matrix.shape[1])]
    part = checkpoint._gather([mapped], rows, (256, matrix.shape[1]), np.dtype(np.float32))
    assert np.array_equal(part, matrix[256:512])
    # 8 MB, and what the kernel maps around a fault on either side: up to 2 MB each.
    assert 8 * megabyte <= resident_bytes(tmp_path) <= 12 * megabyte
    del mapped


def resident_bytes(directory: Path) -> int:
    """Bytes of mapped files under a directory that this process has touched."""
    total, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_inside = str(directory) in line
        elif is_inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_two_processes_read_half_of_the_sharded_weights_each() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parents[2]}{os.pathsep}{here}"}
    command = [sys.executable, str(here / "rank_program.py"), coordinator]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(QWEN2)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    reports = [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]
    alone = LoadedModel(QWEN2).logits(list(range(16)))
    dummy = LoadedModel(QWEN2, dummy_seed=5).logits(list(range(16)))
    tensors = load_file(QWEN2 / "model.safetensors")
    norm_bytes = sum(tensor.nbytes for name, tensor in tensors.items() if "norm" in name)
    all_bytes = sum(tensor.nbytes for tensor in tensors.values())
    for report in reports:
        assert report["num_read_bytes"] == norm_bytes + (all_bytes - norm_bytes) // 2
        assert max_difference(report["logits"], alone[-1]) < 1e-4
        assert max_difference(report["scanned_logits"], alone[-1]) < 1e-4
        assert max_difference(report["dummy_logits"], dummy[-1]) < 1e-4


def test_dummy_weights_are_the_same_at_every_tp_size() -> None:
    config = dataclasses.replace(load_model_config(QWEN2), vocab_size=509)
    layouts = {tp_size: model_layout(config, tp_size) for tp_size in (1, 4)}
    whole, sharded = (dummy_weights(config, make_mesh(tp_size), "float32", 3) for tp_size in (1, 4))
    embedding = np.asarray(sharded["embed_tokens"]["weight"])
    assert np.array_equal(embedding[:509], np.asarray(whole["embed_tokens"]["weight"]))
    assert not embedding[509:].any()
    rows = layouts[4].rows["heads"]
    q_proj = [np.asarray(p["layers"][1]["self_attn"]["q_proj"]["weight"]) for p in (whole, sharded)]
    assert np.array_equal(q_proj[1][rows >= 0], q_proj[0][rows[rows >= 0]])


def test_dummy_weights_follow_the_seed_and_differ_among_parameters() -> None:
    config = load_model_config(QWEN2)
    mesh = make_mesh(1)
    first, again, other = (flat(dummy_weights(config, mesh, "float32", s)) for s in (1, 1, 2))
    name = "['layers'][0]['mlp']['up_proj']['weight']"
    assert np.array_equal(first[name], again[name])
    assert not np.array_equal(first[name], other[name])
    assert not np.array_equal(first[name], first[name.replace("up", "gate")])
    assert first[name].std() == pytest.approx(64**-0.5, rel=0.05)
    assert abs(first[name].mean()) < 0.01
    assert (first["['norm']['weight']"] == 1).all()
