"""One host of a cluster formed by flags: rank and address as arguments; serves nothing."""

import logging
import signal
import sys
import threading

import ray

from cluster.nodes import read_cluster
from cluster.rendezvous import form_cluster
from engine.config import EngineConfig


def main() -> None:
    rank, address = int(sys.argv[1]), sys.argv[2]
    logging.basicConfig(level="INFO", stream=sys.stderr)
    config = EngineConfig.model_validate(
        {
            "model_path": "m",
            "nnodes": 2,
            "tp_size": 2,
            "node_rank": rank,
            "dist_init_addr": address,
            "dist_timeout_s": 200,
        }
    )
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with form_cluster(config, stop) as membership:
        if membership.rank == 0:
            assert ray.is_initialized()
            seen = sorted(node.rank for node in read_cluster().nodes if node.rank is not None)
            print("0 sees", *seen, flush=True)
            stop.wait()
        else:
            print(f"{membership.rank} has joined", flush=True)
            membership.wait(stop)


if __name__ == "__main__":
    main()
