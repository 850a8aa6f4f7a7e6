"""A gang without a model on the TPU slices of a cluster, told on lines of JSON; for a test.

    gang_on_slices.py <folder for the ranks' files> <seconds of silence that mean death>

Starts, waits for the gang's failure, starts again, and ends.
"""

import asyncio
import json
import os
import sys
import time

import ray

from cluster.host_group import HostGroup
from cluster.nodes import TPU_SLICE_LABEL, read_cluster
from engine.config import EngineConfig, parse_config
from engine.errors import QwenOnRayError


def tell(event: str, **facts: object) -> None:
    print(json.dumps({"event": event, "at_s": time.monotonic(), **facts}), flush=True)


async def start(group: HostGroup, event: str) -> None:
    await group.start(
        lambda progress: tell("progress", note=progress.note) if progress.note else None
    )
    nodes = {node.node_id: node for node in read_cluster().nodes}
    gang = [nodes[host.facts.node_id] for host in group.hosts]
    tell(
        event,
        slices=[node.labels[TPU_SLICE_LABEL] for node in gang],
        worker_ids=[node.rank for node in gang],
        addresses=[node.address for node in gang],
        alive=sorted(node.address for node in nodes.values() if "TPU" in node.resources),
    )


async def main(config: EngineConfig) -> None:
    group = HostGroup(config, program="null_program:start")
    try:
        await start(group, "first")
        tell("failed", reason=str(await group.failed()))
        await start(group, "second")
    except QwenOnRayError as error:
        tell("error", reason=str(error))
    finally:
        await group.stop()
        tell("stopped")


if __name__ == "__main__":
    ray.init(
        address="auto",
        log_to_driver=False,
        # The ranks' program lies beside other tests.
        runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}},
    )
    fields = {"model_path": sys.argv[1], "tpu": "v6e:2x4", "nnodes": 2}
    asyncio.run(main(parse_config({**fields, "host_timeout_s": float(sys.argv[2])})))
