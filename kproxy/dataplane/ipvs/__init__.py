"""ipvs mode: virtual servers in the kernel, ipsets, and the few rules that go with them."""
