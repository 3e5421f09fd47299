"""How much memory a process may still take: what the machine has left, and what its container or job is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
# Limit, usage, and what of the usage is cached files that the kernel drops when memory is short: cgroup v2, then v1.
FILES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


def available_memory(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of main memory that are free, within the limits of every control group that this process is in."""
    return min([psutil.virtual_memory().available, *(_left(folder) for folder in _groups(cgroups, own))])


def _groups(cgroups: Path, own: Path) -> Iterator[Path]:
    """The folders of the process's groups and of those around them; in a container its own group is the root."""
    yield from (cgroups, cgroups / "memory")
    try:
        lines = own.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            group = Path(path.lstrip("/"))
            yield from (cgroups / controllers / part for part in (group, *group.parents))


def _left(folder: Path) -> float:
    for limit, usage, cached in FILES:
        try:
            allowed, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
            dropped = sum(int(value) for name, value in lines if name in cached)
        except (OSError, ValueError):  # not of this version, or no limit: "max"
            continue
        return max(0, allowed - used + dropped)
    return float("inf")
