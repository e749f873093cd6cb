"""Metrics: the families, the connection counters read from the kernel, and the server that exposes them."""
