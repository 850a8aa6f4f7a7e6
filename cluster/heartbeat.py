"""Which nodes answer: asked at the moment when it matters, and not of Ray's own table.

Ray takes a host for alive until it has missed health checks for some time, up to a minute where a
link was cut. So whoever is about to put a gang on hosts asks each host's raylet itself, by the very
call that Ray's head makes (gRPC's health check, with the cluster's token and TLS): a host that is
well takes milliseconds, and one that is off, cut off or frozen is known after one deadline. A task
on each node would ask the same, but starts a process there, which takes seconds on a busy host, and
stays pending on a dead one; a TCP connection alone also opens to a raylet that is frozen.
"""

import asyncio
from collections.abc import Iterable
from typing import cast

import grpc
import grpc.aio
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS

from cluster.addresses import bracketed
from cluster.nodes import Node

_METHOD = "/grpc.health.v1.Health/Check"
_NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def silent_nodes(nodes: Iterable[Node], *, timeout_s: float) -> frozenset[str]:
    """Ask nodes, all at once, whether they are there.

    Args:
        timeout_s: How long each of them may take.

    Returns:
        Ids of those that did not answer.
    """
    asked = list(nodes)
    answers = await asyncio.gather(*(_answers(node, timeout_s) for node in asked))
    return frozenset(
        node.node_id for node, is_there in zip(asked, answers, strict=True) if not is_there
    )


async def _answers(node: Node, timeout_s: float) -> bool:
    address = f"{bracketed(node.address)}:{node.port}"
    opened = init_grpc_channel(address, GLOBAL_GRPC_OPTIONS, asynchronous=True)
    async with cast(grpc.aio.Channel, opened) as channel:
        try:
            # An empty request, about the server as a whole; whatever it says, it is there.
            await channel.unary_unary(_METHOD)(b"", timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            return error.code() not in _NO_ANSWER
    return True
