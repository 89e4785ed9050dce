"""How much memory this process may still take on its host."""

import os
import re
from pathlib import Path

MEMINFO, GROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def total_bytes() -> int:
    """Returns the memory of this host, or what a container or job may take of it. The same at any time."""
    limits = [limit for _, limit in _limited_groups()]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits])


def available_bytes() -> int:
    """Returns what the kernel could give without swapping, within the limits of a container or job (cgroups of version
    2); half of all memory where it does not say.
    """
    try:
        kib = _number("MemAvailable:", MEMINFO.read_text())
    except (OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(0, min([kib * 1024, *_left_in_groups()]))


def _left_in_groups() -> list[int]:
    """Returns what the process's groups with a limit leave, pages of files that were read once not counted."""
    left = []
    try:
        for group, limit in _limited_groups():
            used = int((group / "memory.current").read_text())
            left.append(limit - used + _number("inactive_file", (group / "memory.stat").read_text()))
    except (OSError, ValueError):
        return left  # no such groups here
    return left


def _limited_groups() -> list[tuple[Path, int]]:
    """Returns the process's groups with a limit, and the bytes that it allows."""
    found = []
    try:
        (name,) = re.findall(r"^0::/(.*)$", OWN_GROUP.read_text(), re.MULTILINE)
        own = GROUPS / name
        for group in (own, *(parent for parent in own.parents if parent.is_relative_to(GROUPS))):
            if (file := group / "memory.max").exists() and (limit := file.read_text().strip()).isdigit():
                found.append((group, int(limit)))
    except (OSError, ValueError):
        return found  # no such groups here
    return found


def _number(name: str, text: str) -> int:
    (found,) = re.findall(rf"^{name}\s+(\d+)", text, re.MULTILINE)
    return int(found)
