"""A clock that waits for the device, peak memory, and runs that take turns."""
import statistics
import time
from functools import partial

import torch

from prune import UNPRUNED, flops, kv_bytes
from support.files import need
from support.parallel import first_number
from support.progress import Progress, clear_line
from support.sampling import one_past


SILENT = Progress(quiet=True)


def clock(device):
    """Seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device, reset=False):
    """Peak bytes of the GPU's allocator since the last reset.

    None on a CPU: the peak of the whole process says nothing about one of several arms.
    """
    if device.type != "cuda":
        return None
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device)


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

    def run(arm, new):
        made = generate(model, tokens, new, *arm, **options)
        return made.prefill_s, made.decode_s
    return {name: partial(run, arm) for name, arm in arms.items()}


def fewer(repeats, seconds):
    """How often a prefill that takes so long is measured: at most 3 times from 5 s, once from 60 s.

    Of several processes the first decides. A smaller number than was asked for is said.
    """
    most = 1 if seconds > 60 else 3 if seconds > 5 else repeats
    chosen = first_number(min(repeats, most))
    if chosen < repeats:
        print(f"a prefill takes {seconds:.0f} s: timed {chosen}, not {repeats} times", flush=True)
    return chosen


def take_turns(device, arms, new, repeats, warm_ups=2, progress=SILENT):
    """Times of several arms, {name: run(new tokens) -> (prefill seconds, decode seconds)}.

    After warm-ups (the second finds what the first made compile anew) `repeats` runs of each, or
    `fewer`; the last three also decode. -> {name: {"prefill": [s], "decode": [s], "peak": bytes}}.
    """
    slowest = 0.0
    for i in range(warm_ups):
        seconds = []
        for name, run in arms.items():
            progress.note(f"{name}: warming up, {i + 1} of {warm_ups}")
            seconds.append(run(min(new, 4))[0])
        slowest = max(seconds)      # of the last time: the first may compile
    progress.clear()
    repeats = fewer(repeats, slowest)
    found = {name: {"prefill": [], "decode": []} for name in arms}
    for i in range(repeats):
        decodes = i >= repeats - 3
        # there and back: nobody always follows the same arm
        for name in list(arms) if i % 2 == 0 else list(reversed(arms)):
            progress.note(f"{name}: {i + 1} of {repeats} times")
            peak_memory(device, reset=True)
            prefill_s, decode_s = arms[name](new if decodes else 1)
            found[name]["peak"] = peak_memory(device)
            found[name]["prefill"].append(prefill_s)
            if decodes:
                found[name]["decode"].append(decode_s)
    progress.clear()
    return found


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
                     "e2e_s": prefill_s + decode_s * (new - 1), "peak_bytes": found["peak"],
                     "kv_bytes": kv_bytes(c, [m + new - 1 for m in counts], size),
                     "flops": flops(c, counts, schedule=used)}
    full, sdtp = row["full"], row["sdtp"]
    row["ideal"] = full["flops"] / sdtp["flops"]
    row["speedup"] = {part: full[f"{part}_s"] / sdtp[f"{part}_s"] for part in ("prefill", "e2e")}
    row["share_of_ideal"] = row["speedup"]["prefill"] / row["ideal"]
    return row
