"""The proxy modes on this machine: each opens its part of the kernel, and says what only it has."""
