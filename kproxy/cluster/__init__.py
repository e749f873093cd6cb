"""The last known Services, EndpointSlices and Node, and which Services a change touches."""

from kproxy.cluster.state import ClusterState

__all__ = ["ClusterState"]
