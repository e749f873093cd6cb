"""The laboratory: namespaces, packets, API stand-ins, in which kproxy meets a real kernel."""
