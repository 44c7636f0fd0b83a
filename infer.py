"""Generation with and without SDTP side by side, and Table 2's times (Sections 3.4 and 4.3).

Both arms run the same code: prune.prefill with a schedule or without, then prune.extend one token
at a time on the caches, ragged or not. Prefill is bound by arithmetic and gains from fewer tokens;
decode is bound by bytes moved (weights and caches) and gains from shorter caches alone.

    python infer.py                                             # the toy answers a long prompt
    python infer.py --ckpt smollm2 --prompt-file report.txt --html survivors.html
    python infer.py --ckpt random:mistral-7b --bench 4096 8192  # Table 2's rows; needs no weights

Shapes: B = 1 row, N prompt tokens, V vocabulary.
"""
import itertools
import statistics
from dataclasses import asdict
from typing import NamedTuple

import torch

from model import KVCache
from prune import UNPRUNED, extend, prefill
from support.caches import compile_model, h2o, held_bytes
from support.files import need
from support.options import cli, hardware, print_json
from support.parallel import agreed
from support.parsers import check_inference, infer_parser
from support.printing import BENCH_HEAD, print_bench
from support.progress import Progress
from support.prompts import encode_prompt
from support.sampling import ends, finite, fitting, greedy, one_past, sampler
from support.saved import load_pruning, read_pruning
from support.timing import (SILENT, bench_row, check_bench, check_measured, clock, medians,
                            one_by_one, random_prompt, take_turns, timed_arms)


class Generation(NamedTuple):
    tokens: list                    # the new token ids
    trace: list                     # prune.Stage of every stage
    counts: list                    # prompt tokens that entered each block
    prefill_s: float                # until the first new token is known
    decode_s: float                 # per further token, the median
    prompt_kv_bytes: int            # all caches after the prompt
    kv_bytes: int                   # all caches at the end


@torch.no_grad()
def generate(model, tokens, max_new_tokens, schedule=None, scorer=None, cache=KVCache,
             pick=greedy, eos=None, step=extend):
    """Prefill, pruned where schedule and scorer say so, then decode: tokens (1, N) -> Generation.

    cache: the kind of cache, such as h2o(0.4). pick: greedy, or sampler(temperature). eos: the
    token or tokens that end the text (default: the model's). step: prune.extend, or it compiled.
    Raises ValueError for too few positions, before the work, and for logits that are not finite.
    """
    B, N = tokens.shape
    need(B == 1, f"generate reads one prompt, not {B}: see lab/batch.py")
    end = one_past(model.config, N, max_new_tokens)
    eos = ends(model, eos)
    start = clock(model.device)
    logits, caches, trace = prefill(model, tokens, schedule, scorer, end - N, cache)
    token = pick(finite(model, logits))                             # (1, 1)
    pos = torch.tensor([[N]], device=tokens.device)
    new = [token.item()]
    times = [clock(model.device)]
    prompt_kv_bytes = held_bytes(caches)
    while len(new) < max_new_tokens and new[-1] not in eos:
        logits = step(model, token, pos, caches, end)               # (1, 1, V)
        token = pick(finite(model, logits[:, -1]))
        pos = pos + 1
        new.append(token.item())
        times.append(clock(model.device))
    spent = [after - before for before, after in itertools.pairwise(times)]
    return Generation(
        tokens=new,
        trace=trace,
        counts=(schedule or UNPRUNED).counts(N, len(caches)),
        prefill_s=times[0] - start,
        decode_s=statistics.median(spent) if spent else 0.0,
        prompt_kv_bytes=prompt_kv_bytes,
        kv_bytes=held_bytes(caches))


def side_by_side(model, tokens, arms, new, progress=SILENT, **options):
    """Arms {name: (schedule, scorer)} on one prompt (1, N) -> {name: Generation}.

    The first run of each arm says its text and is a warm-up. The times are medians over further
    runs in turn, in which every arm makes as many tokens as the longest text has, past an eos too.
    """
    runs = {}
    for name, arm in arms.items():
        progress.note(f"{name}: reading {tokens.shape[1]} tokens and answering")
        runs[name] = generate(model, tokens, new, *arm, **options)
    longest = max(len(run.tokens) for run in runs.values())
    timed = timed_arms(generate, model, tokens, arms, **options)
    times = take_turns(model, tokens.shape[1], timed, longest, 4, 1, progress, "step" in options)
    for name, run in runs.items():
        prefill_s, decode_s = medians(times[name])
        runs[name] = run._replace(prefill_s=prefill_s, decode_s=decode_s)
    return runs


def both_arms(schedule, scorer):
    """What `side_by_side` compares here: {name: (schedule, scorer)}."""
    return {"full": (None, None), "sdtp": (schedule, scorer)}


def bench(model, lengths, schedule, scorer, new=128, repeats=5, progress=SILENT, **options):
    """Print Table 2's rows, measured on random tokens -> a list of dicts, see `bench_row`."""
    check_bench(model, lengths, new)
    print(f"{hardware(model.device)}, {model.dtype}; {new} new tokens; medians of {repeats} "
          f"prefills in turn\n{BENCH_HEAD}")
    arms = both_arms(schedule, scorer)

    def measure(n):
        timed = timed_arms(generate, model, random_prompt(model, n), arms, **options)
        times = take_turns(model, n, timed, new, repeats, 2, progress, "step" in options)
        row = bench_row(model, n, schedule, times, new)
        print_bench(row)
        return row
    return one_by_one(lengths, measure)


def main():
    from lab.demo import show_arms
    from lab.scorers import SCORERS, make_scorer
    args = infer_parser(__doc__, SCORERS).parse_args()
    check_inference(args)
    torch.manual_seed(args.seed)
    pruning = read_pruning(args)    # what can be refused is refused before weights are read
    prompt = None if args.bench else encode_prompt(args, pruning)
    if args.bench:
        longest, default = max(args.bench), 128
    else:
        longest, default = len(prompt.ids), 48
    new = fitting(pruning.config, longest, args.max_new_tokens, default)
    model, schedule, predictors, metadata = load_pruning(args, pruning)
    prior = metadata.get("prior", 0.0)
    scorer = make_scorer(args.scorer, model, schedule, predictors, args.seed, prior)
    scorer = agreed(scorer)         # with --tp: the first process decides for all
    options = compile_model(model, extend) if args.compile else {}
    options["progress"] = Progress(quiet=args.quiet)
    if args.bench:
        rows = bench(model, args.bench, schedule, scorer, new, args.repeats, **options)
        result = {"bench": rows}
    else:
        tokens = torch.tensor([prompt.ids], device=model.device)
        arms = both_arms(schedule, scorer)
        if args.h2o is not None:
            options["cache"] = h2o(args.h2o)
        pick = agreed(sampler(args.temperature))
        runs = side_by_side(model, tokens, arms, new, pick=pick, **options)
        result = show_arms(model, prompt, runs, schedule, args.html)
    print_json(args, model, {"schedule": asdict(schedule), **result})
    if args.bench:
        check_measured(rows, args.bench)


if __name__ == "__main__":
    cli(main)
