"""Memory of the machine, and what of it this process may have. Plain Python: `doctor` asks before it loads MLX."""

from __future__ import annotations

import os
from pathlib import Path


def host_memory() -> int:
    """Bytes that this process may have: the machine's, or fewer where its control groups say so."""
    limit = group_limit()
    return physical_memory() if limit is None else min(physical_memory(), limit)


def physical_memory() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def group_limit(own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that Linux lets the control groups of this process have, which a container or a unit of systemd sets; None
    without a limit. The narrowest of its group and all around it counts, as cgroups(7) describes both versions."""
    if not own.exists():
        return None
    limits = []
    for line in own.read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (mounted / "memory", "memory.limit_in_bytes") if controllers else (mounted, "memory.max")
        # In a container the group may be named as the host sees it, and mounted as the root.
        place = root / group.strip("/")
        for folder in (place, *place.parents):
            if folder.is_relative_to(root) and (folder / name).exists():
                limits.append((folder / name).read_text(encoding="utf-8").strip())
    return min((int(limit) for limit in limits if limit.isdecimal()), default=None)
