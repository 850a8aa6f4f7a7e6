"""One rank of a gang as a process of its own: joins jax.distributed, runs a sequence, prints it.

Arguments: coordinator address, number of ranks, this rank, model directory, prompt as JSON.
"""

import json
import logging
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from plan_driver import PlanDriver, start_runner


def main() -> None:
    address, num_ranks, rank, model_path, prompt = sys.argv[1:]
    logging.basicConfig(level="INFO")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(address, int(num_ranks), int(rank), initialization_timeout=60)
    runner, limits = start_runner(
        model_path=model_path,
        nnodes=int(num_ranks),
        node_rank=int(rank),
        tp_size=int(num_ranks),
        max_running_requests=2,
        context_length=64,
    )
    driver = PlanDriver(runner, limits)
    sequence = driver.admit(0, json.loads(prompt))
    pending = [driver.dispatch([], [(sequence, len(sequence.tokens))])]
    pending += [driver.dispatch([sequence]) for _ in range(5)]
    tokens = [int(step.wait().token_ids[0]) for step in pending]
    print(json.dumps({"tokens": tokens, "num_pages": limits.num_pages}), flush=True)
    print(runner.num_compiles_since_ready, flush=True)


if __name__ == "__main__":
    main()
