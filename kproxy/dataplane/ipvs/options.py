"""What ipvs mode depends on beside the node's facts."""

from __future__ import annotations

import msgspec


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Chosen at start from the configuration and from what the machine can."""

    scheduler: str = ""  # of virtual servers, as the kernel calls it; empty: rr
    random_fully: bool = True  # the MASQUERADE target knows --random-fully (iptables 1.6.2)
    # Send the traffic of a policy Local elsewhere if no endpoint is on this node, as kube-proxy does in this mode, but
    # replies to outside clients then come from the wrong address. Otherwise such a virtual server has no real server.
    stock_local_fallback: bool = False
