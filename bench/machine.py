"""Says where a benchmark ran: the machine, the system and the versions."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import psutil

__all__ = ["describe", "revision"]

_PACKAGES = ("llamaherd", "pyzmq", "msgspec", "uvloop")


def describe() -> dict[str, str]:
    """Return facts in the order in which a report shows them."""
    facts = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load at the start": f"{os.getloadavg()[0]:.2f}",
        "commit": revision(),
    }
    for package in _PACKAGES:
        facts[package] = _version(package)
    facts["libzmq"] = _libzmq()
    return facts


def revision() -> str:
    """Return the commit that was measured, or ``unknown``; ``, modified`` if files differ from it."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "transport", "bench/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}, modified" if changed else commit


def _git(*arguments: str) -> str:
    root = Path(__file__).parents[1]
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _libzmq() -> str:
    import zmq

    return zmq.zmq_version()
