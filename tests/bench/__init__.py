"""Measures what the design promises: `make bench`."""
