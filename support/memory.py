"""Whether a model fits: its weights against the memory that is free, before any are read."""
from pathlib import Path

import torch

from support.files import need


def check_memory(model, dtype, device, name):
    """Refuse a model, still without weights, that is larger than the memory that is free."""
    free = free_memory(device)
    weights = sum(p.numel() for p in model.parameters())
    wanted = weights * dtype.itemsize
    if free is None or wanted <= free:
        return
    half = weights * torch.bfloat16.itemsize
    kind = str(dtype).removeprefix("torch.")
    line = (f"{name}: its {weights / 1e9:.1f} billion weights need {wanted / 1e9:.1f} GB in "
            f"{kind}, {free / 1e9:.1f} GB are free on {device.type}: ")
    if half < wanted and half <= free:
        need(False, f"{line}--dtype bfloat16 needs {half / 1e9:.1f} GB")
    half_too = f" ({half / 1e9:.1f} GB in bfloat16)" if half < wanted else ""
    need(False, f"{line}take a smaller model{half_too}, or several devices (docs/parallel.md)")


def free_memory(device):
    """Bytes that are free on a device; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [free_here(), free_in_group()] if device.type == "cpu" else []
    return min((free for free in found if free is not None), default=None)


def free_here():
    """Free memory of this machine, what files occupy in passing included."""
    for line in lines_of("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def free_in_group():
    """What is left of the limit of this container, where it has one."""
    group = Path("/sys/fs/cgroup")
    limit, used = lines_of(group / "memory.max"), lines_of(group / "memory.current")
    if not limit or not used or not limit[0].isdigit():
        return None
    cached = [int(line.split()[1]) for line in lines_of(group / "memory.stat")
              if line.startswith(("inactive_file ", "active_file "))]
    return int(limit[0]) - int(used[0]) + sum(cached)


def lines_of(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
