"""How many CPUs this process may use: Slurm and containers give it fewer than the machine has."""

import os


def usable_cpus() -> int:
    """The CPUs that the scheduler allows, or fewer by the quota of a container (Linux: cgroup 2)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="utf-8") as f:
            quota, period = f.read().split()  # "200000 100000": two CPUs; "max 100000": no limit
        return max(1, min(cpus, int(quota) // int(period)))
    except (OSError, ValueError):
        return cpus
