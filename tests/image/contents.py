"""Prints what an image consists of. Runs in it, from standard input: see `make image`."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

_PARTS = (
    (r"/usr/local/lib/python3[^/]*/dist-packages/kproxy.*", "kproxy"),
    (r"/usr/local/lib/python3[^/]*/dist-packages/_?([A-Za-z0-9]+(?:_core)?).*", r"Python package \1"),
    (r"/usr/(lib|bin)/python3.*", "Python"),
    (r"/usr/s?bin/(xtables|ip6?tables|arp|eb|nfnl).*|/usr/lib/[^/]+/(xtables/.*|lib(xt|ip|nf|mnl).*)", "iptables"),
    (r"/usr/lib/[^/]+/lib(ssl|crypto)\..*|/etc/ssl/.*", "OpenSSL and certificates"),
    (r"/usr/lib(64)?/.*|/usr/s?bin/.*|/etc/ld.*", "C library and others"),
    (r".*", "documents and settings"),
)
_SMALL = 700_000  # bytes


def main() -> None:
    """One line a part, the largest first."""
    sizes: Counter[str] = Counter()
    device = Path("/").stat().st_dev
    for directory, below, files in os.walk("/"):
        below[:] = [name for name in below if Path(directory, name).lstat().st_dev == device]
        for path in (Path(directory, name) for name in files):
            sizes[_part(str(path))] += path.lstat().st_size
    packages = [part for part, size in sizes.items() if part.startswith("Python package") and size < _SMALL]
    sizes[f"{len(packages)} smaller Python packages"] = sum(sizes.pop(part) for part in packages)
    for part, size in sizes.most_common():
        print(f"{size / 1e6:6.1f} MB  {part}")
    print(f"{sizes.total() / 1e6:6.1f} MB  in all, uncompressed")


def _part(path: str) -> str:
    return next(match.expand(name) for pattern, name in _PARTS if (match := re.fullmatch(pattern, path)))


main()
