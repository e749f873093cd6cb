"""What kproxy does, shown step by step on a small cluster in network namespaces: `python -m tests.demo`."""
