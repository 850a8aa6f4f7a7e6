"""`qwen-on-ray status`: what `serve status` says, and what it has no words for.

Serve knows that a replica starts, not how far it is; that a leader answers, not that its hosts are
being rebuilt; and takes no word of a user_config that was refused. The replicas write all that
down (`cluster.status`), and this puts it beside Serve's own status. Changes nothing.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatusOverview

from cluster.status import describe_progress, living_actors, read_all, read_refusals


def status_main(argv: Sequence[str]) -> int:
    """Run `qwen-on-ray status`; the exit status is 0 if all is well."""
    parser = argparse.ArgumentParser(
        prog="qwen-on-ray status",
        description="Say how each engine of a running cluster is, and how far its start has come.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--address",
        default="auto",
        help="Of the cluster's head, HOST:PORT. Default: this machine's Ray, or RAY_ADDRESS.",
    )
    address = parser.parse_args(list(argv)).address
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        print(f"qwen-on-ray: no cluster at --address={address}: {error}", file=sys.stderr)
        return 2
    try:
        lines, is_well = describe_applications()
    finally:
        ray.shutdown()
    print("\n".join(lines))
    return 0 if is_well else 1


def describe_applications() -> tuple[list[str], bool]:
    """Put every application of the cluster that this process has joined into lines.

    Returns:
        The lines, and whether every application runs, all its engines serve, and all its replicas
        took their user_config.
    """
    applications = serve.status().applications
    living = living_actors()
    lines: list[str] = []
    is_well = bool(applications)
    for name, application in applications.items():
        statuses = {
            replica: status
            for replica, status in read_all(name).items()
            if status["phase"] == "failed" or status["actor"] in living
        }
        living_ids = {actor.rpartition("#")[2] for actor in living}
        refusals = {
            replica: refusal
            for replica, refusal in read_refusals(name).items()
            if replica in living_ids
        }
        lines += _describe(name, application, statuses, refusals)
        serve_all = all(status["phase"] == "ready" for status in statuses.values())
        is_well &= application.status == "RUNNING" and serve_all and not refusals
    return lines or ["Nothing is served in this cluster."], is_well


def _describe(
    name: str,
    application: ApplicationStatusOverview,
    statuses: Mapping[str, Mapping[str, Any]],
    refusals: Mapping[str, str],
) -> Iterator[str]:
    """The lines of one application.

    Args:
        statuses: Of its engines that live, or have failed, by replica id.
        refusals: Of its replicas that did not take their user_config.
    """
    yield f"{name}: {application.status.value}"
    for deployment, overview in application.deployments.items():
        replicas = ", ".join(f"{n} {state}" for state, n in overview.replica_states.items())
        message = f": {overview.message}" if overview.message else ""
        yield f"  {deployment}: {overview.status.value} ({replicas or 'no replica'}){message}"
    for replica, status in statuses.items():
        yield f"  engine {replica}: {describe_engine(status)}"
        if status["phase"] != "ready":
            for rank in status["ranks"]:
                yield f"    rank {rank['rank']}: {describe_progress(rank)}"
    for replica, refusal in refusals.items():
        yield f"  replica {replica} goes on without its user_config: {refusal}"


def describe_engine(status: Mapping[str, Any]) -> str:
    """Say in a line how an engine is, as in "rebuilding, epoch 3: weights 40 of 98"."""
    if status["phase"] == "ready":
        return f"serves, epoch {status['epoch']}"
    if status["phase"] == "failed":
        return f"failed, {time.time() - status['time']:.0f} s ago: {status['note']}"
    what = "starting" if status["epoch"] == 1 else "rebuilding"
    return f"{what}, epoch {status['epoch']}: {describe_progress(status)}"
