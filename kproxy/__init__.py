"""kproxy: a Kubernetes service proxy for Linux nodes."""

__version__ = "0.1.0"
