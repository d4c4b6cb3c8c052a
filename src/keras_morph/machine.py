"""The machine that we are on: its processor, and how much memory is free. Nothing here needs Keras."""

import os
import platform
from pathlib import Path

__all__ = ["cpu_name", "free_memory"]


def free_memory() -> int:
    """Bytes that can be had without swapping: of the machine, or of the container if that is less."""
    found = []
    if available := _numbers("/proc/meminfo").get("MemAvailable:"):
        found.append(available * 1024)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    group = Path("/sys/fs/cgroup")
    if (limit := _text(group / "memory.max")).isdigit():
        used = int(_text(group / "memory.current") or 0) - _numbers(group / "memory.stat").get("inactive_file", 0)
        found.append(max(0, int(limit) - used))
    return min(found, default=2**32)


def cpu_name() -> str:
    """The processor's name."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _numbers(path: str | Path) -> dict[str, int]:
    """The first number of each line of a file of the system, by the word in front of it."""
    words = [line.split() for line in _text(Path(path)).splitlines()]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}
