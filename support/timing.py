"""A clock that waits for the device, peak memory, and runs that take turns."""
import statistics
import time
from pathlib import Path

import torch

from prune import UNPRUNED, flops, kv_bytes


def clock(device):
    """Seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device, reset=False):
    """Peak bytes since the last reset: of the GPU's allocator, else of the process (or None)."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return None


def random_prompt(model, n):
    """n tokens drawn from the vocabulary, the same for the same n: (1, n) on the device."""
    generator = torch.Generator().manual_seed(n)
    tokens = torch.randint(model.config.vocab, (1, n), generator=generator)
    return tokens.to(model.device)


def take_turns(device, arms, new, repeats):
    """Times of several arms, {name: run(new tokens) -> (prefill seconds, decode seconds)}.

    After two warm-ups (the second finds what the first made compile anew) `repeats` runs of each;
    the last three also decode. -> {name: {"prefill": [s], "decode": [s], "peak": bytes}}.
    """
    for run in [*arms.values(), *arms.values()]:
        run(min(new, 4))
    found = {name: {"prefill": [], "decode": []} for name in arms}
    for i in range(repeats):
        decodes = i >= repeats - 3
        # there and back: nobody always follows the same arm
        for name in list(arms) if i % 2 == 0 else list(reversed(arms)):
            peak_memory(device, reset=True)
            prefill_s, decode_s = arms[name](new if decodes else 1)
            found[name]["peak"] = peak_memory(device)
            found[name]["prefill"].append(prefill_s)
            if decodes:
                found[name]["decode"].append(decode_s)
    return found


def bench_row(model, n, schedule, times, new):
    """One row of Table 2 from the times of `take_turns`, a dict.

    Each arm's medians and spreads, the speed-up of SDTP, and its ideal by FLOPs. FLOPs of SDTP are
    those of the paper's predictors, whatever scorer runs; every other arm is unpruned.
    """
    c, L = model.config, len(model.blocks)
    size = model.embed.weight.element_size()
    row = {"n": n}
    for name, found in times.items():
        used = schedule if name == "sdtp" else UNPRUNED
        counts = used.counts(n, L)
        prefill_s, decode_s = (statistics.median(found[part]) for part in ("prefill", "decode"))
        row[name] = {"prefill_s": prefill_s, "decode_s": decode_s,
                     "prefill_spread_s": [min(found["prefill"]), max(found["prefill"])],
                     "decode_spread_s": [min(found["decode"]), max(found["decode"])],
                     "e2e_s": prefill_s + decode_s * (new - 1), "peak_bytes": found["peak"],
                     "kv_bytes": kv_bytes(c, [m + new - 1 for m in counts], size),
                     "flops": flops(c, counts, schedule=used)}
    full, sdtp = row["full"], row["sdtp"]
    row["ideal"] = full["flops"] / sdtp["flops"]
    row["speedup"] = {part: full[f"{part}_s"] / sdtp[f"{part}_s"] for part in ("prefill", "e2e")}
    row["share_of_ideal"] = row["speedup"]["prefill"] / row["ideal"]
    return row
