"""Generation with and without SDTP side by side, and Table 2's times (Sections 3.4 and 4.3).

Both arms run the same code: prune.prefill with a schedule or without, then prune.extend on the
caches, ragged or not. Prefill is bound by arithmetic and gains from fewer tokens; decode is bound
by bytes moved (weights and caches) and gains from shorter caches alone. A prompt that was read once
answers any number of questions: after each answer its caches are set back.

    python infer.py                                             # the toy reads once, answers six
    python infer.py --ckpt smollm2 --prompt-file report.txt --ask "Who wrote it?" --html page.html
    python infer.py --ckpt random:mistral-7b --bench 4096 8192  # Table 2's rows; needs no weights

Shapes: N prompt tokens, n of a question, V vocabulary.
"""
import statistics
from dataclasses import asdict
from functools import partial
from itertools import count, islice, pairwise
from typing import NamedTuple

import torch

from model import KVCache, Tokenizer
from prune import (UNPRUNED, check, extend, flops, kv_bytes, load_pruning, predictor_scorer,
                   prefill, protected)
from support import options, processes, runs, show
from support.files import need
from support.weights import compile_blocks


class Generation(NamedTuple):
    """What was said after a prompt, or after a question: then without trace, counts and caches."""
    tokens: list                    # the new token ids, an eos included
    ended: bool                     # whether an eos came
    prefill_s: float                # until the first new token is known
    decode_s: float                 # per further token, the median
    trace: list = ()                # prune.Stage of every stage
    counts: list = ()               # prompt tokens that entered each block
    caches: list = ()               # as the last token left them


def greedy(logits):
    """The likeliest token: (1, V) -> (1, 1)."""
    return logits.argmax(-1, keepdim=True)


def sampler(temperature):
    """A choice of tokens, (1, V) -> (1, 1): greedy at temperature 0, else drawn."""
    need(0 <= temperature < float("inf"), f"temperature {temperature}: expected 0 or more")
    if temperature == 0:
        return greedy
    return lambda logits: torch.multinomial((logits / max(temperature, 1e-3)).softmax(-1), 1)


@torch.no_grad()
def decode(model, logits, caches, N, pick=greedy):
    """Token ids after a prompt of N tokens, without an end; the first follows from logits (1, V).

    Raises ValueError for logits that are not finite.
    """
    for pos in count(N):
        need(logits.isfinite().all(), f"the logits are not finite in {model.dtype}: the weights "
                                      "are damaged, or too large for float16")
        token = pick(logits)                                        # (1, 1)
        yield token.item()
        logits = extend(model, token, pos, caches)[:, -1]


@torch.no_grad()
def ask(model, question, start, caches, max_new_tokens, logits=None, pick=greedy, eos=None,
        stop=None):
    """Answer a question (1, n), which stands from position `start` on, on a prompt's caches.

    The caches need room for question and answer. They are set back: the next question finds them as
    this one did. Without a question (n = 0) the answer follows from the prompt's logits (1, V), and
    the caches stay as the last token left them. pick: greedy, or sampler(temperature). eos: the
    token ids that end the text (default: the model's). stop(tokens): whether it ends for other
    reasons. -> a Generation.
    """
    eos = model.config.eos if eos is None else eos
    new, times = [], [runs.clock(model.device)]
    if question.shape[1]:
        held = [cache.n for cache in caches]
        logits = extend(model, question, start, caches)[:, -1]
    tokens = decode(model, logits, caches, start + question.shape[1], pick)
    for token in islice(tokens, max_new_tokens):
        times.append(runs.clock(model.device))
        new.append(token)
        if token in eos or stop and stop(new):
            break
    if question.shape[1]:
        for cache, n in zip(caches, held):
            cache.n = n
    first_s, *further = [after - before for before, after in pairwise(times)]
    return Generation(new, new[-1] in eos, first_s, statistics.median(further or [0.0]))


@torch.no_grad()
def generate(model, tokens, max_new_tokens, schedule=UNPRUNED, scorer=None, cache=KVCache, **how):
    """Prefill, pruned where schedule and scorer say so, then decode: tokens (1, N) -> Generation.

    cache: the kind of cache; how: pick, eos and stop of `ask`. Raises ValueError for too few
    positions, before the work, and for what is not finite.
    """
    N = tokens.shape[1]
    need(max_new_tokens > 0, f"max_new_tokens is {max_new_tokens}, expected at least 1")
    end = N + max_new_tokens - 1                                    # the last token is not read
    model.check_positions(end)
    begin = runs.clock(model.device)
    logits, caches, trace = prefill(model, tokens, schedule, scorer, end - N, cache)
    check(trace)
    prefill_s = runs.clock(model.device) - begin
    said = ask(model, tokens[:, :0], N, caches, max_new_tokens, logits, **how)
    return said._replace(prefill_s=prefill_s + said.prefill_s, trace=trace, caches=caches,
                         counts=schedule.counts(N, len(caches)))


def compare(model, tokens, arms, new, repeats, progress, predictors=None, times=None, **how):
    """Arms {name: (schedule, scorer)} on a prompt (1, N), in turn -> a row of Table 2, a dict.

    Every arm makes `new` tokens, past an eos too. predictors: those that the arms use. times: those
    of runs.take_turns, where they are known already.
    """
    N, costs = tokens.shape[1], {}
    calls = {name: partial(generate, model, tokens, new, *arm, eos=(), **how)
             for name, arm in arms.items()}
    times = times or runs.take_turns(calls, repeats, progress)
    for name, (schedule, _) in arms.items():
        counts = schedule.counts(N, len(model.blocks))
        costs[name] = {"flops": flops(model.config, counts, "exact", schedule, predictors),
                       "kv_bytes": kv_bytes(model.config, counts, model.dtype.itemsize)}
    return runs.table_row(N, new, times, costs)


def bench(model, arms, sizes, new, repeats, progress, predictors=None):
    """Table 2's rows, measured on prompts of `sizes` random tokens: yields each as it is known."""
    model.check_positions(max(sizes) + new - 1)
    for N in sizes:
        tokens = runs.random_prompt(model.config.vocab, N).to(model.device)
        yield compare(model, tokens, arms, new, repeats, progress, predictors)


@torch.no_grad()
def respond(model, prompt, name, arm, new, pick, seed):
    """One arm reads a support.options.Prompt once and answers its questions, printed as they come.

    -> what was said, a dict; the trace; seconds of the prefill and of a decoded token.
    """
    tokens, N = torch.tensor([prompt.ids], device=model.device), len(prompt.ids)
    room = new + max(len(question.ids) for question in prompt.questions)
    model.check_positions(N + room - 1)
    begin, answers = runs.clock(model.device), []
    logits, caches, trace = prefill(model, tokens, *arm, room=room)
    check(trace)
    prefill_s = runs.clock(model.device) - begin
    for question in prompt.questions:
        torch.manual_seed(seed)                                     # all arms draw the same numbers
        writer = show.Writer(name, question, prompt.tokenizer)
        ids = tokens.new_tensor([question.ids])
        said = ask(model, ids, N, caches, new, logits, pick, stop=writer)
        answers.append(writer.end(said))
    told = {"answers": answers, "counts": arm[0].counts(N, len(caches)),
            "total_s": runs.clock(model.device) - begin}
    return told, trace, (prefill_s, said.decode_s)


def answer(args, prompt, model, arms, new, progress, predictors):
    """Both arms answer a support.options.Prompt, then they are timed -> a dict."""
    pick, read, times = processes.agreed(sampler(args.temperature)), {}, {}
    for name, arm in arms.items():
        read[name], trace, seconds = respond(model, prompt, name, arm, new, pick, args.seed)
        times[name] = [seconds]
    slow = times["full"][0][0] > 2
    show.hint(model, slow)
    if args.repeats or not slow:
        times = None                # else the very passes that answered count
    tokens = torch.tensor([prompt.ids], device=model.device)
    row = compare(model, tokens, arms, 8, args.repeats or 5, progress, predictors, times, pick=pick)
    N = len(prompt.ids)
    fixed = protected(torch.arange(N), N, arms["sdtp"][0]).tolist()
    return show.arms(prompt, read, trace, row, fixed, args.html)


def main():
    args = options.infer_options(__doc__)
    torch.manual_seed(args.seed)
    prompt = None if args.bench else options.read_prompt(args, Tokenizer(args.ckpt))
    split = processes.tensor_parallel() if args.tp else None
    model, schedule, predictors = load_pruning(args, split)
    if args.compile:
        compile_blocks(model.blocks)
    sizes = args.bench or [len(prompt.ids)]
    if args.left:
        schedule = schedule.leaving(args.left, sizes[0], len(model.blocks))
    scorer = processes.agreed(predictor_scorer(predictors))         # with --tp: the first decides
    arms = {"full": (UNPRUNED, None), "sdtp": (schedule, scorer)}
    new = options.fitting(args, model.config.max_positions, prompt)
    progress = runs.Progress(quiet=args.quiet)
    if args.bench:
        rows = bench(model, arms, sizes, new, args.repeats or 5, progress, predictors)
        result = {"bench": show.bench(model, rows, new)}
    else:
        result = answer(args, prompt, model, arms, new, progress, predictors)
    options.print_json(args, model, {"schedule": asdict(schedule), **result})


if __name__ == "__main__":
    options.cli(main)
