"""What Serve calls in each handle to find a replica: it follows the order that came with the call.

Serve pickles this module by value, its own classes included: no class but the follower lies here,
so that a `Route` is the same class on both sides. The interface is in flux; all of it is here.
"""

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cluster.engine_choice import Route


class RouteFollower(RequestRouter):
    """Serve's way to a replica: the first of the call's `Route` that lives and has room."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Rank replicas; Serve tries a rank after the other, and all again after a pause."""
        route = pending_request.kwargs.get("route") if pending_request else None
        if not isinstance(route, Route):
            return [candidate_replicas]
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        wanted = [by_id.pop(engine_id) for engine_id in route.order if engine_id in by_id]
        # An engine that is gone is not waited for: that would keep one of the few tasks that Serve
        # has for finding replicas, and other calls with it.
        return [*([replica] for replica in wanted), list(by_id.values())]


def list_running(engine: DeploymentHandle) -> frozenset[str] | None:
    """Ids of the engines to which Serve would send a call; None before it knows of any.

    A call that finds none makes Serve start one, so whoever only asks how engines are has to know
    before. Serve tells it in no public way.
    """
    if not engine.running_replicas_populated():
        return None
    router = engine._router._asyncio_router._active_request_router  # type: ignore[union-attr]
    return frozenset(replica_id.unique_id for replica_id in router.curr_replicas)
