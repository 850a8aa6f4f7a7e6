"""One rank of two that load a checkpoint together; prints what it held as JSON.

python rank_program.py COORDINATOR RANK DIRECTORY
"""

import json
import sys
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)

from model_harness import LoadedModel  # noqa: E402  (the number of devices comes first)

from engine.models import checkpoint  # noqa: E402
from engine.models.config import load_model_config  # noqa: E402
from engine.models.layer_stack import lay_out_for_cpu  # noqa: E402


def main(coordinator: str, rank: int, directory: Path) -> None:
    jax.distributed.initialize(coordinator, 2, rank, initialization_timeout=60)
    num_read_bytes = 0
    gather = checkpoint._gather

    def counting_gather(*args):
        nonlocal num_read_bytes
        result = gather(*args)
        num_read_bytes += result.nbytes
        return result

    checkpoint._gather = counting_gather
    config, prompt = load_model_config(directory), list(range(16))
    model = LoadedModel(directory, config, tp_size=2, backend="xla")
    report = {"num_read_bytes": num_read_bytes, "logits": model.logits(prompt)[-1].tolist()}
    model.params = lay_out_for_cpu(config, model.params)
    report["scanned_logits"] = model.logits(prompt)[-1].tolist()
    dummy = LoadedModel(directory, config, tp_size=2, backend="xla", dummy_seed=5)
    report["dummy_logits"] = dummy.logits(prompt)[-1].tolist()
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
