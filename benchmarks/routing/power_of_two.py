"""Serve's default way to an engine, for what is measured against it: the shorter of two queues.

Serve pickles this module by value: nothing but the router lies here.
"""

import random

from ray.serve.request_router import PendingRequest, RunningReplica

from cluster.request_router import RouteFollower


class PowerOfTwoChoices(RouteFollower):
    """Two engines by chance for each request; Serve takes the one with fewer calls under way.

    `PowerOfTwoChoicesRequestRouter` itself would also send the questions how an engine is to any of
    them, and routers would take an engine that another one answered for as silent.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if pending_request is not None and pending_request.metadata.call_method == "generate":
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        return await super().choose_replicas(candidate_replicas, pending_request)
