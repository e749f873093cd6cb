"""Walks the routes for one packet, as the kernel will: which Service, which policy, which endpoints, and why.

This is the plan's own account of itself, and the oracle that packets through the real kernel are tested against.
It speaks of the first packet of a connection, from a client that no affinity is known of. Each mode has its walk.
"""

from kproxy.explain.terms import Action, Explanation, Node, Packet

__all__ = ["Action", "Explanation", "Node", "Packet"]
