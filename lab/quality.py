"""Quality of pruned prompts: is the performance "comparable" (Section 4.2; Tables 1, 3 and 6)?

Every task is a list of prompts, each with one or more answers. A prompt is read once by each
scorer, pruned under the same schedule, and the answers are read on its caches. The table has one
row a scorer; a row of data is measured under all scorers before the next one, so differences
between scorers are paired.

    python -m lab.quality                                   # the toy's held-out rows
    python -m lab.quality --ckpt smollm2 --data dolly.jsonl --context \\
        --min-prompt 128 --max-prompt 448 --limit 100
    python -m lab.quality --ckpt smollm2 --task long --data multi_news.jsonl \\
        --max-prompt 2048 --rouge                           # Table 1
    python -m lab.quality --ckpt smollm2 --data dolly.jsonl --context \\
        --scorers full full+h2o full+local predictor predictor+h2o      # Table 6

tasks: nll      likelihood of the response of Dolly rows {instruction, context, response}; "share
                of gap" says where a scorer stands between random pruning (0%) and the full model
                (100%), "predictor ahead by" how much of it lies between, with the error of rows
                compared one by one
       text     likelihood of the next --max-response tokens after --max-prompt tokens of plain
                text, rows {text}
       long     rows {context, input, answers} (LongBench), {transcript, queries} (QMSum) or
                Dolly's: F1 or ROUGE-L of the generated answer, its likelihood, and Table 1's times
       needle   a sentence that gives a town a number is hidden in plain text, rows {text}: how
                likely is a digit of the number, by --lengths and --depths, and is all of it the
                model's own choice?
scorers: full; predictor, neighbours (the same, averaged with the scores of the tokens around),
       predictor:MASS (each stage keeps MASS of its scores' softmax, another number in each row; in
       seconds, not in FLOPs, the prompt is read twice),
       random, recent, earliest, norm, attention;
       oracle:norm_gx and so on (they need the answer: ceilings, no methods).
       The field's: progressive (LazyLLM: the last token's attention, stage by stage), middle
       (FastKV: that of the last 8, one cut behind half of the blocks), two-pass (GemFilter: an
       early block's choice is read as a shorter text), adaptive:MASS (UniPrefill: one cut, which
       keeps MASS, by default 0.99, of what the last 128 tokens attend to, and so another number in
       each row; in seconds, not in FLOPs, the blocks before it are read twice), lookahead,
       lookahead:32 (speculative prefill: --draft looks 8 tokens ahead; by token, or in chunks of
       32).
       A shorter text, as if it were the prompt: compress (by the predictors), truncate (the first
       tokens), bm25, bm25:passage (what shares words with the question).
       Each may be followed by @S (only the first S stages; the paper's SDTP-low)
       or @cut (one cut, where the first stage stands, to the same mean number of tokens), and by
       +h2o or +local (KV caches compressed to --h2o, by heavy hitters and recency or by recency
       alone, once the prompt is read: an answer's first token still comes from the whole prompt).

--min-prompt, --max-prompt, --context, --template, --system and --question shape the tasks nll and
long (text: --max-prompt alone). --split validation reads the rows that settings are chosen by.

Rows already measured are kept under out/quality/: the same command goes on where it was stopped.

Shapes: N prompt tokens, n tokens of a text or an answer, V vocabulary, S stages.
"""
import copy
import itertools
import math
import re
import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import torch
from torch import nn

from infer import generate
from lab import tasks
from lab.caches import h2o
from lab.scorers import (AHEAD, FIELD, SCORERS, TRAINED, Fronted, by_chunks, by_mass, early_layer,
                         enough, known_scorer, lookahead, make_scorer, one_cut, oracle_scorer,
                         scorer_flops)
from model import KVCache, Llama, Tokenizer, load
from prune import UNPRUNED, Schedule, check, extend, flops, load_pruning, prefill, select
from saliency import REDUCE, saliency
from support import options, runs
from support.chat import choose_chat
from support.files import blame, need
from support.rows import digest, encode_row, rows_at_hand
from support.weights import find

# -------------------------------------------------------------------------------------------- arms

ORACLES = tuple(f"oracle:{reduce}" for reduce in REDUCE)
TEXTS = ("compress", "truncate", "bm25", "two-pass")    # a shorter text is read by every block
# One cut, behind this share of the blocks; None: where the first stage stands.
CUTS = {"middle": 0.5, "lookahead": 0.0, "adaptive": None}
ARMS = ("full", *TEXTS, "bm25:passage", "lookahead", "adaptive", *SCORERS, *FIELD, *ORACLES)
NAME = re.compile(rf"({'|'.join(ARMS)}|lookahead:[1-9]\d*|(?:adaptive|predictor):0?\.\d+)"
                  r"(@[1-9]\d*|@cut)?(\+h2o|\+local)?")
USUAL = ("full", "predictor", "random", "recent", "earliest", "norm", "attention", "truncate",
         "oracle:norm_gx")


class Arm(NamedTuple):
    """What one row of the table is measured with."""
    scorer: str                     # one of ARMS, maybe with a number
    stages: int                     # only the first so many
    cache: Callable                 # the kind of cache
    cut: bool = False               # one cut instead of stages


def parse_arm(name, stages, share=0.4):
    """An arm's name, like "predictor@5+h2o" -> Arm.

    stages: how many the schedule has; share: what a compressed cache keeps. Raises ValueError for
    a name that says nothing.
    """
    match = NAME.fullmatch(name)
    need(match, f"unknown scorer {name!r}; there are {', '.join(ARMS)}, each with @STAGES "
                "or @cut and +h2o or +local after it")
    scorer, first, compressed = match.groups()
    need(not first or scorer.partition(":")[0] not in CUTS,
         f"{scorer} has one cut in its own place, {first} does nothing: leave it out")
    cut = first == "@cut"
    if first and not cut:
        stages = min(stages, int(first[1:]))
    cache = h2o(share, 0.5 * (compressed == "+h2o")) if compressed else KVCache
    return Arm(scorer, stages, cache, cut)


# ----------------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Setup:
    """What is the same for all rows and arms."""
    model: Llama
    schedule: Schedule
    predictors: Optional[nn.ModuleList] = None
    share: float = 0.4              # what +h2o and +local keep of every cache
    new_tokens: int = 0             # generated in every arm; 0: answers are only read
    tokenizer: Optional[Tokenizer] = None       # to say what was generated, to filter a text
    score: Callable = tasks.f1      # (said, right) -> 0 to 1
    encode: Optional[Callable] = None           # a row -> Example, with the template of the others
    draft: Optional[Llama] = None               # lookahead's; the model itself where there is none


class Reading(NamedTuple):
    """How an arm reads a prompt, and what that costs."""
    model: Llama                    # or lab.scorers.Fronted
    text: torch.Tensor              # (1, n) what is read of it
    how: tuple                      # schedule, scorer and kind of cache, for prune.prefill
    keep: float                     # the mean share of the prompt in a block
    flops: float                    # of the prefill, a draft or second pass included
    seconds: float                  # spent before the model reads


def prepare(setup, arm, prompt, item, seed, known):
    """What an arm makes of a prompt (1, N) -> Reading; seed: that of random scores.

    item: the prompt's Item, None where there is none. known: {oracle: saliency} of it, and
    what a draft said of it, filled by the first arm that needs them.
    """
    model, blocks, N = setup.model, len(setup.model.blocks), prompt.shape[1]
    start, (name, _, size) = runs.clock(model.device), arm.scorer.partition(":")
    reader, text, scorer, extra = model, prompt, None, 0
    schedule = setup.schedule
    if arm.scorer in ORACLES and arm.scorer not in known:
        right = torch.tensor([item.prompt + item.answers[0].tokens], device=model.device)
        known[arm.scorer] = saliency(model, right, N, schedule.after(blocks), size)
    if arm.cut or name in CUTS:
        share = CUTS.get(name)
        schedule = one_cut(schedule, blocks, None if share is None else int(share * blocks))
    else:
        schedule = replace(schedule, stages=arm.stages)
    if arm.scorer in ORACLES:
        scorer = oracle_scorer(known[arm.scorer])
    elif name in TEXTS:
        text, extra = chosen_text(setup, name, size, prompt, item, schedule)
        schedule = UNPRUNED
    elif name == "lookahead":
        reader, (scores, seconds, extra) = Fronted(model), looked_ahead(setup, prompt, known)
        start = runs.clock(model.device) - seconds
        scorer = known_scorer(by_chunks(scores, int(size)) if size else scores)
    elif name == "adaptive":
        scores = by_chunks(early_layer(model, prompt, schedule.first, last=128), 64)
        schedule = replace(schedule, keep=enough(scores, float(size or 0.99)) / N)
        scorer = known_scorer(scores)
    elif name != "full":
        scorer = make_scorer(name, model, schedule, setup.predictors, seed)
        if size:
            schedule = by_mass(model, prompt, schedule, scorer, float(size))
    else:
        schedule = UNPRUNED
    counts = schedule.counts(text.shape[1], len(reader.blocks))[-blocks:]
    used = (schedule, setup.predictors) if name in TRAINED else ()
    cost = flops(model.config, counts, "exact", *used) + extra
    cost += scorer_flops(name, model.config, schedule, counts)
    spent = runs.clock(model.device) - start
    how = schedule, scorer, arm.cache
    return Reading(reader, text, how, sum(counts) / blocks / N, cost, spent)


def looked_ahead(setup, prompt, known):
    """A draft's scores of a prompt (1, N), the seconds and the FLOPs; it is asked once a row."""
    if "lookahead" not in known:
        device, draft = setup.model.device, setup.draft or setup.model
        start, cost = runs.clock(device), [prompt.shape[1] + AHEAD] * len(draft.blocks)
        scores = lookahead(draft, prompt).to(device)
        known["lookahead"] = scores, runs.clock(device) - start, flops(draft.config, cost)
    return known["lookahead"]


def chosen_text(setup, name, size, prompt, item, schedule):
    """The tokens of a prompt (1, N) that are read as a shorter text -> (1, k), FLOPs spent on it.
    """
    model, N = setup.model, prompt.shape[1]
    config, blocks = model.config, len(model.blocks)
    if name == "truncate":
        return shortened(model, prompt, schedule), 0
    if name == "compress":
        scorer = make_scorer("predictor", model, schedule, setup.predictors)
        cost = flops(config, [N] * blocks, "exact", schedule, setup.predictors)
        return shortened(model, prompt, schedule, scorer), cost
    if name == "two-pass":
        read = round(13 / 32 * blocks)
        scores = early_layer(model, prompt, read)
        share = sum(schedule.counts(N, blocks)) / N - read      # of a prompt, in all blocks
        need(share > 0, f"its first pass, {read} of {blocks} blocks, costs more than the schedule")
        k, pos = round(share / blocks * N), torch.arange(N, device=prompt.device)[None]
        return prompt[:, select(scores, pos, k, N, schedule)], flops(config, [N] * read)
    need(item and item.row.get("context"), "bm25 chooses from the context of a row, --task nll")

    def count(text):
        return len(setup.tokenizer.encode(text, bos=False))
    room = round(sum(schedule.counts(N, blocks)) / blocks) - N + count(item.row["context"])
    row = tasks.filtered(item.row, size or "sentence", room, count)
    example = setup.encode(row)
    return example.tokens[None, :example.prompt_len].to(prompt.device), 0


def shortened(model, tokens, schedule, scorer=None):
    """The top-scored tokens of a prompt alone: (1, N) -> (1, k), k the schedule's mean in a block.

    As LLMLingua compresses it, with our scores: every stage scores the whole prompt in an unpruned
    pass, and the highest mean ranks stay. Without a scorer it is truncated: the first tokens stay.
    """
    N = tokens.shape[1]
    pos = torch.arange(N, device=tokens.device)[None]
    ranks = -pos
    if scorer:
        _, _, trace = prefill(model, tokens, replace(schedule, keep=1.0), scorer)
        ranks = sum(stage.scores.argsort(1).argsort(1) for stage in trace)
    counts = schedule.counts(N, len(model.blocks))
    return tokens[:, select(ranks, pos, round(sum(counts) / len(counts)), N, schedule)]


@torch.no_grad()
def read_answers(model, tokens, answers, schedule=UNPRUNED, scorer=None, cache=KVCache):
    """Several answers after one prompt, pruned or not: tokens (1, N).

    -> for each Answer [log-likelihood, tokens that count, whether each is the model's own choice],
    and the seconds of the prefill. An answer is read in one pass, under H2O token by token, as
    decode would.
    """
    start, N, device = runs.clock(model.device), tokens.shape[1], model.device
    room = max(len(answer.tokens) for answer in answers) - 1        # the last is not read
    first, caches, trace = prefill(model, tokens, schedule, scorer, room, cache)
    check(trace)
    seconds, found = runs.clock(device) - start, []
    step = max(1, room) if cache is KVCache else 1
    for answer in answers:
        ids, logits = torch.tensor([answer.tokens], device=device), [first]     # (1, n), (1, V)
        own = copy.deepcopy(caches)         # each finds the caches as the prompt left them
        for i, part in enumerate(ids[:, :-1].split(step, dim=1)):
            logits.append(extend(model, part, N + i, own)[0])
        log_p = torch.cat(logits)[answer.start:].log_softmax(-1)                # (n, V)
        right = ids[0, answer.start:]
        value = log_p.gather(1, right[:, None]).sum().item()
        need(math.isfinite(value), f"the logits are not finite in {model.dtype}")
        found.append([value, len(right), bool((log_p.argmax(-1) == right).all())])
    return found, seconds


# ----------------------------------------------------------------------------------------- measure


def measure(setup, item, names, number):
    """One row of data under every arm -> {arm's name: see measure_arm}; number: the row's.

    Odd rows meet the arms from the last to the first: rows are also timed, and no arm should always
    follow the same other one.
    """
    known, found = {}, {}
    for name in reversed(names) if number % 2 else names:
        with blame(f"row {number + 1}", name):
            found[name] = measure_arm(setup, item, name, number, known)
    return found


def measure_arm(setup, item, name, seed, known):
    """One row under one arm; see `prepare`.

    -> {"answers": see read_answers, "keep": mean share of the prompt in a block, "flops": of the
    prefill, the full model's are 1, "prefill_s"}, and where an answer was generated also "said",
    "score", "e2e_s".
    """
    model, new = setup.model, setup.new_tokens
    arm = parse_arm(name, setup.schedule.stages, setup.share)
    prompt = torch.tensor([item.prompt], device=model.device)
    reading = prepare(setup, arm, prompt, item, seed, known)
    model, text, spent = reading.model, reading.text, reading.seconds
    answers, seconds = read_answers(model, text, item.answers, *reading.how)
    whole = flops(model.config, [len(item.prompt)] * len(setup.model.blocks))
    found = {"answers": answers, "keep": reading.keep, "flops": reading.flops / whole,
             "prefill_s": spent + seconds}
    if new:
        run = generate(model, text, new, *reading.how, eos=())      # all arms make as many tokens
        ids = itertools.takewhile(lambda token: token not in model.config.eos, run.tokens)
        said = setup.tokenizer.decode(list(ids))
        found["said"] = said
        found["score"] = max(setup.score(said, right) for right in item.texts)
        found["prefill_s"] = spent + run.prefill_s
        found["e2e_s"] = found["prefill_s"] + run.decode_s * (new - 1)
    return found


def measure_rows(setup, items, names, store, quiet=False):
    """`measure` for every item, or what the runs.Measured `store` holds of it -> a list of dicts.

    A row's number is the seed of its random scores.
    """
    if setup.new_tokens:
        measure(setup, items[0], names[:2], 0)              # a warm-up: rows are also timed
    return [store.get([number, item], partial(measure, setup, item, names, number))
            for number, item in enumerate(runs.counted(items, "rows", quiet))]


# ----------------------------------------------------------------------------------------- metrics


class Metric(NamedTuple):
    """One number a row; the metric is the sum of the values over the sum of the weights."""
    values: list
    weights: list


def ratio(values, weights):
    """Sum over sum, and its standard error (ratio estimator, rows independent): NLL per token.

    Of one row there is no error: None.
    """
    n, total = len(values), sum(weights)
    mean = sum(values) / total
    if n == 1:
        return mean, None
    squares = sum((value - mean * weight) ** 2 for value, weight in zip(values, weights))
    return mean, (squares * n / (n - 1)) ** 0.5 / abs(total)


def mean_of(values):
    values = [float(value) for value in values]
    return Metric(values, [1.0] * len(values))


def difference(a, b):
    return [x - y for x, y in zip(a, b)]


def metrics(rows, arm, task, score="f1"):
    """The metrics of one arm: {name: Metric}; score: the name of what Setup.score gives."""
    own = [row[arm] for row in rows]
    values, counts, chosen = zip(*(one["answers"][0] for one in own))
    found = {"nll": Metric([-value for value in values], list(counts))}
    if task == "needle":
        found["acc"] = mean_of(chosen)
    if task == "long":
        found[score] = mean_of(one["score"] for one in own)
        for part in ("prefill", "e2e") if "full" in rows[0] else ():    # full's time over the arm's
            full, times = ([row[name][f"{part}_s"] for row in rows] for name in ("full", arm))
            found[f"{part}_speedup"] = Metric(full, times)
    return found


def against_full(metric, arm):
    """The difference from the full model, paired by row; metric: {arm: Metric}."""
    if "full" not in metric or arm == "full":
        return {}
    values, weights = metric[arm]
    value, error = ratio(difference(values, metric["full"].values), weights)
    return {"vs_full": value, "vs_full_stderr": error}


def share_of_gap(metric, arm):
    """Where an arm stands between random (0) and full (1), and by how much of this gap the trained
    predictors are ahead of it; both paired by row.
    """
    if not {"full", "random"} <= set(metric):
        return {}
    gap = difference(metric["random"].values, metric["full"].values)
    if not sum(gap):
        return {}

    def lead(of, over):
        """How far one arm is ahead of another, in units of the gap, and the error."""
        return ratio(difference(metric[over].values, metric[of].values), gap)

    found = {}
    if arm not in ("full", "random"):
        found["share_of_gap"], found["share_stderr"] = lead(arm, "random")
    if "predictor" in metric and arm != "predictor":
        found["predictor_ahead"], found["predictor_ahead_stderr"] = lead("predictor", arm)
    return found


# ------------------------------------------------------------------------------------------ tables


def table(rows, arms, task, score="f1"):
    """Rows of the result, a dict for each metric and arm, from those of measure_rows."""
    by_arm = {arm: metrics(rows, arm, task, score) for arm in arms}
    found = []
    for name, arm in itertools.product(by_arm[arms[0]], arms):
        metric = {other: by_arm[other][name] for other in arms}
        value, error = ratio(*metric[arm])
        keep = sum(row[arm]["keep"] for row in rows) / len(rows)
        row = {"scorer": arm, "metric": name, "value": value, "stderr": error, "n": len(rows),
               "mean_keep": keep, "flops": statistics.fmean(row[arm]["flops"] for row in rows),
               "prefill_s": statistics.median(row[arm]["prefill_s"] for row in rows)}
        if not name.endswith("speedup"):
            row |= against_full(metric, arm)
        if name == "nll":
            row |= share_of_gap(metric, arm)
        found.append(row)
    return found


def show(rows):
    """Print the table: a block for each metric, the best arm first."""
    for metric, these in itertools.groupby(rows, lambda row: row["metric"]):
        these = sorted(these, key=lambda row: row["value"], reverse=metric != "nll")
        print(f"\n{'scorer':18} {metric:>14}             kept  FLOPs   against full         "
              "share of gap       predictor ahead by")
        for row in these:
            print(line(row))


def line(row):
    text = f"{row['scorer']:18} {row['value']:14.3f}{error(row['stderr'])}"
    text += f"  {row['mean_keep']:7.1%}  {row['flops']:5.1%}"
    if "vs_full" in row:
        text += f"   {row['vs_full']:+.3f}{error(row['vs_full_stderr'])}"
    if "share_of_gap" in row:
        text += f"   {row['share_of_gap']:8.1%}{error(row['share_stderr'], '.1%')}"
    if "predictor_ahead" in row:
        text = f"{text:95}   {row['predictor_ahead']:+8.1%}"
        text += error(row["predictor_ahead_stderr"], ".1%")
    return text


def error(value, kind=".3f"):
    """A standard error as text; "" where there is none."""
    return "" if value is None else f" +- {value:{kind}}"


def cells(rows, arms, lengths, depths):
    """Task needle: the probability of a digit, the geometric mean, at every length and depth.

    rows: those of measure_rows. Prints a line for each cell -> a list of dicts, one for each arm
    of a cell.
    """
    print("\nprobability of a digit\nlength  depth" + "".join(f"{arm:>18}" for arm in arms))
    found = []
    for (n, depth), row in zip(itertools.product(lengths, depths), rows):
        text = f"{n:6,} {depth:5}%"
        for arm in arms:
            value, count, _ = row[arm]["answers"][0]
            digit = math.exp(value / count)
            text += f"{digit:18.2f}"
            found.append({"scorer": arm, "length": n, "depth": depth, "probability": digit})
        print(text)
    return found


# ------------------------------------------------------------------------------------ command line

USED_BY = {     # what shapes each task
    "nll": "split context question min_prompt max_prompt max_response template system limit",
    "text": "max_prompt max_response limit",
    "long": "split question min_prompt max_prompt max_response template system limit "
            "max_new_tokens rouge",
    "needle": "question template system lengths depths",
}


def quality_options():
    parser = options.command_parser(__doc__)
    options.add_pruning_options(parser)
    options.add_data_options(parser, limit=100)
    parser.add_argument("--task", choices=("nll", "text", "long", "needle"), default="nll",
                        help="see above")
    parser.add_argument("--split", choices=("heldout", "validation", "all"), default="heldout",
                        help="which rows: those to measure on, to choose settings by, or all")
    parser.add_argument("--scorers", nargs="+", help="see above; default: the usual ones")
    parser.add_argument("--draft", metavar="CKPT", help="the model that lookahead asks; it has the "
                        "same tokenizer (default: the model itself)")
    parser.add_argument("--h2o", type=float, default=0.4, metavar="SHARE",
                        help="what +h2o and +local keep of every KV cache")
    parser.add_argument("--max-new-tokens", type=options.at_least(1), default=64,
                        help="task long: tokens generated in every arm (the text ends at eos)")
    parser.add_argument("--rouge", action="store_true",
                        help="task long: ROUGE-L instead of F1 (for summaries)")
    parser.add_argument("--lengths", type=options.at_least(64), nargs="+", metavar="N",
                        default=(1024, 2048), help="task needle: tokens of the prompts")
    parser.add_argument("--depths", type=options.at_least(0), nargs="+", metavar="PERCENT",
                        default=(0, 25, 50, 75, 100), help="where the needle stands in the text")
    args, idle = parser.parse_args(), set(" ".join(USED_BY.values()).split())
    idle -= set(USED_BY[args.task].split())
    options.refuse_idle(parser, args, f"with --task {args.task}", " ".join(idle))
    need(args.draft is None or "lookahead" in " ".join(args.scorers or ()),
         "--draft is for the scorer lookahead: name it, or leave it out")
    return args


def read_items(args, tokenizer, chat):
    """The Items of a task."""
    limits, data = (args.min_prompt, args.max_prompt, args.max_response), args.data
    if args.task == "nll":
        return [tasks.as_item(*row)
                for row in options.rows_from(args, tokenizer, chat, args.split)]
    if args.task == "text":
        return tasks.text_items(tokenizer, data, *limits[1:], args.limit)
    if args.task == "long":
        return tasks.long_items(tokenizer, data, chat, args.split, *limits, args.question,
                                args.limit)
    ids = tasks.running_text(tokenizer, data)
    return [tasks.needle_item(tokenizer, ids, chat, n, depth, args.question)
            for n, depth in itertools.product(args.lengths, args.depths)]


def drafting(args, tokenizer, model):
    """The model of --draft. Raises ValueError where it cannot draft."""
    text = "The quick brown fox, 2 + 2.\n\nZwölf Boxkämpfer"
    need(Tokenizer(args.draft).encode(text) == tokenizer.encode(text),
         f"--draft {args.draft}: its tokenizer is not that of {args.ckpt}")
    return load(args.draft, model.dtype, model.device)


def main():
    args = quality_options()
    args.data = args.data or rows_at_hand(args.ckpt)
    tokenizer, (file, metadata) = Tokenizer(args.ckpt), runs.find_predictors(args)
    arms = args.scorers or [name for name in USUAL if file or name not in TRAINED]
    for name in arms:
        parse_arm(name, 1, args.h2o)
    chat = choose_chat(find(args.ckpt), args.template, args.system, metadata)
    items = read_items(args, tokenizer, chat)
    model, schedule, predictors = load_pruning(args)
    draft = args.draft and drafting(args, tokenizer, model)
    new = args.max_new_tokens if args.task == "long" else 0
    score, named = (tasks.rouge_l(), "rouge_l") if args.rouge else (tasks.f1, "f1")
    lengths = [len(item.prompt) for item in items]
    print(f"{args.ckpt}, {args.task}: {len(items)} rows{options.few(len(items))}; prompts of "
          f"{min(lengths)} to {max(lengths)} tokens; {options.in_words(file, metadata, chat)}; "
          f"stages after blocks {schedule.after(len(model.blocks))}, keep {schedule.keep}",
          flush=True)
    # before the work, not in the midst of it
    model.check_positions(max(len(item.prompt) + max(new, len(item.answers[0].tokens)) - 1
                              for item in items))
    encode = partial(encode_row, tokenizer, chat=chat, question=args.question)
    setup = Setup(model, schedule, predictors, args.h2o, new, tokenizer, score, encode, draft)
    weights = digest(model, asdict(model.config), predictors or "")
    run = [arms, schedule, args.h2o, new, named, model.dtype, model.device, weights,
           args.draft]
    store = runs.Measured(f"out/quality/{digest(run)}.jsonl", run)
    done = measure_rows(setup, items, arms, store, args.quiet)
    rows = table(done, arms, args.task, named)
    show(rows)
    told = {"task": args.task, "data": Path(args.data).name, "schedule": asdict(schedule),
            "prompt_tokens": [min(lengths), sum(lengths) / len(lengths), max(lengths)],
            "rows": rows}
    if args.task == "needle":
        told["cells"] = cells(done, arms, args.lengths, args.depths)
    options.print_json(args, model, told)


if __name__ == "__main__":
    options.cli(main)
