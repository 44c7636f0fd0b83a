"""A clock that waits for the device, peak memory, and runs that take turns."""
import ctypes
import re
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from prune import UNPRUNED, flops, kv_bytes
from support.files import need
from support.parallel import first_number
from support.progress import Progress, clear_line
from support.sampling import one_past


SILENT = Progress(quiet=True)
# Tokens that warm up the reading of a longer prompt, which may take minutes.
WARM_UP = 4096


def clock(device):
    """Seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device, reset=False):
    """Peak bytes since the last reset: of the GPU's allocator, on Linux those of the process.

    None where neither is known.
    """
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            ctypes.CDLL(None).malloc_trim(0)    # what an earlier run gave back leaves the process
            Path("/proc/self/clear_refs").write_text("5")       # man proc: the peak is as now
        status = Path("/proc/self/status").read_text()
    except (OSError, AttributeError):           # no Linux, or another C library
        return None
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def random_prompt(model, n):
    """n tokens drawn from the vocabulary, the same for the same n: (1, n) on the device."""
    generator = torch.Generator().manual_seed(n)
    tokens = torch.randint(model.config.vocab, (1, n), generator=generator)
    return tokens.to(model.device)


def check_bench(model, lengths, new):
    """Refuse prompt lengths and a dtype that would waste minutes, before anything is measured."""
    for n in lengths:
        one_past(model.config, n, new)
    if model.device.type == "cpu":
        slower = matmul_s(model.dtype) / matmul_s(torch.float32)
        need(slower < 10,
             f"this CPU only emulates {model.dtype}: a matmul takes {slower:.0f} times as long as "
             "in float32, so measure with --dtype float32")


def matmul_s(dtype, size=256):
    """Seconds of a small square matmul on the CPU."""
    a, b = torch.ones(2, size, size, dtype=dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        a @ b.mT                    # as nn.Linear reads its weight
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def one_by_one(lengths, measure):
    """measure(n) -> a dict, for each prompt length -> the dicts, without the lengths that failed.

    So a length that is too long for the memory does not cost what was measured before.
    """
    rows = []
    for n in lengths:
        try:
            rows.append(measure(n))
        except (RuntimeError, ValueError) as e:         # torch.OutOfMemoryError is a RuntimeError
            clear_line()
            print(f"{n:7d}  not measured: {' '.join(str(e).split()):.300}", flush=True)
    return rows


def check_measured(rows, lengths):
    """That no length failed: said last, when the others are printed, so that the command fails."""
    measured = [row["n"] for row in rows]
    failed = [str(n) for n in lengths if n not in measured]
    need(not failed, f"not measured, see above: prompts of {', '.join(failed)} tokens")


def timed_arms(generate, model, tokens, arms, **options):
    """Arms {name: (schedule, scorer)} on a prompt (1, N), for take_turns: {name: run}.

    generate: infer.generate, with its options. An eos ends nothing: all make as many tokens.
    """
    options["eos"] = ()

    def run(arm, new, first=None):
        made = generate(model, tokens[:, :first], new, *arm, **options)
        return made.prefill_s, made.decode_s
    return {name: partial(run, arm) for name, arm in arms.items()}


def fewer(repeats, seconds):
    """How often a prefill that takes so long is timed: at most 3 times from 5 s, twice from 60 s.

    Of several processes the first decides.
    """
    most = 2 if seconds > 60 else 3 if seconds > 5 else repeats
    return first_number(min(repeats, most))


def take_turns(model, n, arms, new, repeats, warm_ups=2, progress=SILENT, whole=False):
    """Times of several arms on a prompt of n tokens -> what each arm took.

    arms: {name: run(new tokens, first tokens of the prompt) -> seconds of prefill, of a further
    token}. After warm-ups (the second finds what the first made compile anew), on a CPU with at
    most WARM_UP tokens unless the `whole` prompt is wanted, `repeats` runs of each, or `fewer`; the
    last three also decode. -> {name: {"prefill": [s], "decode": [s], "before": bytes of memory,
    "peak": bytes}}.
    """
    first = min(n, WARM_UP) if model.device.type == "cpu" and not whole else n
    growth = cost(model, n) / cost(model, first)
    spent = {}
    for i in range(warm_ups):
        for name, run in arms.items():
            progress.note(f"{n} tokens, {name}: warming up, {i + 1} of {warm_ups}")
            spent[name] = run(min(new, 4), first)       # of the last time: the first may compile
    prefills = [growth * prefill_s for prefill_s, _ in spent.values()]
    decoding = [(new - 1) * decode_s for _, decode_s in spent.values()]
    wanted, repeats = repeats, fewer(repeats, max(prefills))
    total = repeats * sum(prefills) + min(3, repeats) * sum(decoding)
    progress.clear()
    if repeats < wanted:
        print(f"{n:7d}  about {minutes(total)}: a prefill takes {max(prefills):.0f} s, so each arm "
              f"is timed {repeats}, not {wanted} times", flush=True)
    found = {name: {"prefill": [], "decode": []} for name in arms}
    start = time.monotonic()
    for i in range(repeats):
        decodes = i >= repeats - 3
        # there and back: nobody always follows the same arm
        for name in list(arms) if i % 2 == 0 else list(reversed(arms)):
            left = max(0, total - (time.monotonic() - start))
            progress.note(f"{n} tokens, {name}: {i + 1} of {repeats} times, {minutes(left)} left")
            found[name]["before"] = peak_memory(model.device, reset=True)
            prefill_s, decode_s = arms[name](new if decodes else 1)
            found[name]["peak"] = peak_memory(model.device)
            found[name]["prefill"].append(prefill_s)
            if decodes:
                found[name]["decode"].append(decode_s)
    progress.clear()
    return found


def cost(model, n):
    """FLOPs of an unpruned prefill of n tokens."""
    return flops(model.config, [n] * len(model.blocks))


def minutes(seconds):
    """A length of time as people say it."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def medians(times):
    """Of an arm's times by `take_turns`: seconds of a prefill, and of a further token."""
    return [statistics.median(times[part]) for part in ("prefill", "decode")]


def bench_row(model, n, schedule, times, new):
    """One row of Table 2 from the times of `take_turns`, a dict.

    Each arm's medians and spreads, the speed-up of SDTP, and its ideal by FLOPs. FLOPs of SDTP are
    those of the paper's predictors, whatever scorer runs; every other arm is unpruned.
    """
    c, L = model.config, len(model.blocks)
    size = model.embed.weight.element_size()
    row = {"n": n, "repeats": len(times["full"]["prefill"])}
    for name, found in times.items():
        used = schedule if name == "sdtp" else UNPRUNED
        counts = used.counts(n, L)
        prefill_s, decode_s = medians(found)
        row[name] = {"prefill_s": prefill_s, "decode_s": decode_s,
                     "prefill_spread_s": [min(found["prefill"]), max(found["prefill"])],
                     "decode_spread_s": [min(found["decode"]), max(found["decode"])],
                     "e2e_s": prefill_s + decode_s * (new - 1),
                     "before_bytes": found["before"], "peak_bytes": found["peak"],
                     "kv_bytes": kv_bytes(c, [m + new - 1 for m in counts], size),
                     "flops": flops(c, counts, schedule=used)}
    full, sdtp = row["full"], row["sdtp"]
    row["ideal"] = full["flops"] / sdtp["flops"]
    row["speedup"] = {part: full[f"{part}_s"] / sdtp[f"{part}_s"] for part in ("prefill", "e2e")}
    row["share_of_ideal"] = row["speedup"]["prefill"] / row["ideal"]
    return row
