"""What the kernel should hold, and how it gets there: one sub-package for each proxy mode."""
