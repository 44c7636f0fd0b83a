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
from functools import partial
from typing import NamedTuple

import torch

from model import KVCache, Tokenizer
from prune import UNPRUNED, extend, prefill
from support.caches import compile_model, h2o
from support.data import chosen_prompt
from support.files import need
from support.options import cli, hardware, print_json
from support.parallel import agreed
from support.parsers import check_inference, infer_parser
from support.printing import BENCH_HEAD, print_bench
from support.sampling import greedy, sampler
from support.saved import load_pruning
from support.timing import bench_row, clock, random_prompt, take_turns


class Generation(NamedTuple):
    tokens: list                    # the new token ids
    trace: list                     # prune.Stage of every stage
    counts: list                    # prompt tokens that entered each block
    prefill_s: float                # until the first new token is known
    decode_s: float                 # per further token, the median
    kv_bytes: int                   # all caches at the end


@torch.no_grad()
def generate(model, tokens, max_new_tokens, schedule=None, scorer=None, cache=KVCache,
             pick=greedy, eos=None, step=extend):
    """Prefill, pruned where schedule and scorer say so, then decode: tokens (1, N) -> Generation.

    cache: the kind of cache, such as h2o(0.4). pick: greedy, or sampler(temperature). eos: token
    ids that end the text (default: the model's). step: prune.extend, or the same compiled. Raises
    ValueError for too few positions, before the work, and for logits that are not finite.
    """
    need(max_new_tokens > 0, "max_new_tokens must be at least 1")
    N = tokens.shape[1]
    end = N + max_new_tokens - 1                    # one past the last position that is read
    model.check_positions(end)
    eos = model.config.eos if eos is None else eos
    start = clock(model.device)
    logits, caches, trace = prefill(model, tokens, schedule, scorer, max_new_tokens, cache)
    need(logits.isfinite().all(), f"{model.source}: the logits are not finite in {model.dtype}: "
                                  "the weights are damaged, or too large for float16")
    token = pick(logits)                                            # (1, 1)
    pos = torch.tensor([[N]], device=tokens.device)
    new = [token.item()]
    times = [clock(model.device)]
    while len(new) < max_new_tokens and new[-1] not in eos:
        logits = step(model, token, pos, caches, end)               # (1, 1, V)
        token = pick(logits[:, -1])
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
        kv_bytes=sum(held.bytes for held in caches))


def side_by_side(model, tokens, arms, new, **options):
    """Arms {name: (schedule, scorer)} on one prompt (1, N) -> {name: Generation}.

    After a warm-up four timed prefills in turn, of which the median counts; the last goes on to
    `new` tokens.
    """
    runs = {name: [] for name in arms}
    for tokens_to_make in (2, 2, 2, 2, new):
        for name, arm in arms.items():
            run = generate(model, tokens, tokens_to_make, *arm, **options)
            runs[name].append(run)
    results = {}
    for name, (_, *timed) in runs.items():
        seconds = [run.prefill_s for run in timed]
        median = statistics.median(seconds)
        results[name] = timed[-1]._replace(prefill_s=median)
    return results


def both_arms(model, n, schedule, scorer, **options):
    """Full and SDTP on n random tokens: {name: run(new tokens) -> prefill and decode seconds}."""
    tokens = random_prompt(model, n)

    def run(arm, new):
        made = generate(model, tokens, new, *arm, eos=(), **options)
        return made.prefill_s, made.decode_s
    return {"full": partial(run, (None, None)),
            "sdtp": partial(run, (schedule, scorer))}


def bench(model, lengths, schedule, scorer, new=128, repeats=5, **options):
    """Print Table 2's rows, measured on random tokens -> a list of dicts, see `bench_row`."""
    print(f"{hardware(model.device)}, {model.dtype}; {new} new tokens; medians of {repeats} "
          f"prefills in turn\n{BENCH_HEAD}")
    rows = []
    for n in lengths:
        arms = both_arms(model, n, schedule, scorer, **options)
        times = take_turns(model.device, arms, new, repeats)
        rows.append(bench_row(model, n, schedule, times, new))
        print_bench(rows[-1])
    return rows


def main():
    from lab.demo import show_arms
    from lab.scorers import SCORERS, make_scorer
    args = infer_parser(__doc__, SCORERS).parse_args()
    check_inference(args)
    torch.manual_seed(args.seed)
    model, schedule, predictors, metadata = load_pruning(args)
    prior = metadata.get("prior", 0.0)
    scorer = make_scorer(args.scorer, model, schedule, predictors, args.seed, prior)
    scorer = agreed(scorer)         # with --tp: the first process decides for all
    options = compile_model(model, extend) if args.compile else {}
    if args.bench:
        new = args.max_new_tokens or 128
        rows = bench(model, args.bench, schedule, scorer, new, args.repeats, **options)
        result = {"bench": rows}
    else:
        tokenizer = Tokenizer(args.ckpt)
        ids, expected = chosen_prompt(args, tokenizer, metadata)
        tokens = torch.tensor([ids], device=model.device)
        arms = {"full": (None, None), "sdtp": (schedule, scorer)}
        if args.h2o:
            options["cache"] = h2o(args.h2o)
        pick = agreed(sampler(args.temperature))
        new = args.max_new_tokens or 48
        runs = side_by_side(model, tokens, arms, new, pick=pick, **options)
        result = show_arms(model, tokenizer, ids, runs, schedule, expected, args.html)
    print_json(args, model, {"schedule": asdict(schedule), **result})


if __name__ == "__main__":
    cli(main)
