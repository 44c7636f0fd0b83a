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
                compared one by one; then the shares once more, by the length of the answer
       text     likelihood of the next --max-response tokens after --max-prompt tokens of plain
                text, rows {text}
       lambada  the last word of {text}: is it the model's own choice?
       long     rows {context, input, answers} (LongBench), {transcript, queries} (QMSum) or
                Dolly's: F1 or ROUGE-L of the generated answer, its likelihood, and Table 1's times
scorers: full; predictor, prior (the same with its calibrated preference for a position),
       neighbours (the same, averaged with the scores of the tokens around), random, recent,
       earliest, norm, attention, attention16, expected (expected attention); oracle:norm_gx and so
       on (they need the answer: ceilings, no methods); compress (the predictors' scores, but
       the tokens leave the text before block 1), truncate (so do all but the first tokens). Each
       may be followed by @S (only the first S stages; the paper's SDTP-low) or @cut (one cut, where
       the first stage stands, to the same mean number of tokens), and by +h2o or +local (KV caches
       compressed to --h2o, by heavy hitters and recency or by recency alone, once the prompt is
       read: an answer's first token still comes from the whole prompt).

--min-prompt, --max-prompt, --context, --template, --system and --question shape the tasks nll and
long (text: --max-prompt alone). ROUGE-L needs the package rouge-score.

Rows already measured are kept in --rows-file: the same command goes on where it was stopped.

Shapes: B = 1 row, N prompt tokens, n tokens of an answer, V vocabulary, S stages.
"""
import copy
import itertools
import json
import math
import os
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import torch
from torch import nn

from infer import generate, greedy
from lab.schedules import one_cut
from lab.scorers import SCORERS, TRAINED, make_scorer, oracle_scorer
from lab.tasks import Answer, Item, f1, lambada_items, long_items, rouge_l, text_items
from model import KVCache, Llama, Tokenizer, positions
from prune import UNPRUNED, Schedule, extend, prefill, select
from saliency import REDUCE, saliency
from support.caches import NO_WINDOW, H2OCache, h2o
from support.data import digest, parse_row
from support.files import need
from support.options import (add_data_arguments, add_json_argument, add_pruning_arguments,
                             add_quiet_argument, add_tp_argument, at_least, cli, command_parser,
                             print_json, rows_file, rows_from)
from support.parallel import agreed, first_number, rank
from support.progress import Progress
from support.sampling import finite
from support.saved import load_pruning, read_pruning
from support.templates import chosen_template
from support.timing import clock

# -------------------------------------------------------------------------------------------- arms

ORACLES = tuple(f"oracle:{reduce}" for reduce in REDUCE)
ARMS = ("full", "compress", "truncate", *SCORERS, *ORACLES)
UNPRUNED_ARMS = ("full", "compress", "truncate")   # every block reads all that is given to it
HEAVY = {"+h2o": 0.5, "+local": 0.0}    # the part of a compressed cache that is chosen by weight


class Arm(NamedTuple):
    """What one row of the table is measured with."""
    scorer: str                     # one of ARMS
    stages: int                     # only the first so many
    cache: Callable                 # the kind of cache
    cut: bool = False               # one cut instead of stages

    def schedule(self, schedule, blocks):
        """What becomes of a schedule under this arm, in a model of so many blocks."""
        return one_cut(schedule, blocks) if self.cut else replace(schedule, stages=self.stages)


def parse_arm(name, stages, share=0.4):
    """An arm's name, like "predictor@5+h2o" -> Arm.

    stages: how many the schedule has; share: what a compressed cache keeps. Raises ValueError for
    a name that says nothing.
    """
    match = re.fullmatch(r"([a-z_0-9:]+?)(?:@(\d+|cut))?(\+h2o|\+local)?", name)
    need(match and match[1] in ARMS and match[2] != "0",
         f"unknown scorer {name!r}; there are {', '.join(ARMS)}, each with @STAGES or @cut and "
         "+h2o or +local after it")
    scorer, first, compressed = match.groups()
    cache = h2o(share, HEAVY[compressed]) if compressed else KVCache
    cut = first == "cut"
    if first and not cut:
        stages = min(stages, int(first))
    return Arm(scorer, stages, cache, cut)


def default_arms(task, trained, prior, tp):
    """The arms that suit a task; trained: whether there are predictors, prior: and a prior.

    Attention is not summed over the heads of other processes, so --tp leaves its scorers out.
    """
    rules = [name for name in SCORERS if name not in TRAINED]
    suit = {"nll": [*rules, *ORACLES],
            "text": ["random", "recent", "earliest", "norm", "attention", "oracle:norm_gx"],
            "long": ["compress", "random", "recent"]}
    names = suit.get(task, ["random", "recent", "attention"])
    if not trained:
        names = [name for name in names if name != "compress"]
    if tp:
        names = [name for name in names if not name.startswith(("attention", "expected"))]
    own = ["predictor", "prior"] if prior else ["predictor"]
    return ["full", *(own if trained else ()), *names]


# ----------------------------------------------------------------------------------------- answers


def compress(model, tokens, schedule, scorer):
    """Prompt compression as LLMLingua does it, with our scores: tokens (1, N) -> (1, k).

    Every stage scores the whole prompt in an unpruned pass; the tokens of lowest mean rank leave
    the text. k is the schedule's mean number of tokens per block.
    """
    _, _, trace = prefill(model, tokens, replace(schedule, keep=1.0), scorer)
    ranks = [stage.score.argsort(1).argsort(1) for stage in trace]
    return shortened(tokens, sum(ranks).float(), schedule, len(model.blocks))


def truncate(tokens, schedule, blocks):
    """The first tokens and the protected last ones: tokens (1, N) -> (1, k)."""
    return shortened(tokens, -positions(tokens).float(), schedule, blocks)


def shortened(tokens, scores, schedule, blocks):
    """A prompt (1, N) of its k top-scored tokens, k the schedule's mean number in a block."""
    N = tokens.shape[1]
    counts = schedule.counts(N, blocks)
    k = round(sum(counts) / len(counts))
    index = select(scores, positions(tokens), k, N, schedule.sink, schedule.local)
    return tokens.gather(1, index)


@torch.no_grad()
def read_answers(model, tokens, answers, schedule=None, scorer=None, cache=KVCache):
    """Several answers after one prompt, pruned or not: tokens (1, N).

    -> for each Answer [log-likelihood, tokens that count, whether each is the model's own choice],
    and the seconds of the prefill. Every answer finds the caches as the prompt left them.
    """
    start = clock(model.device)
    room = max(len(answer.tokens) for answer in answers) - 1        # the last is not read
    first, caches, _ = prefill(model, tokens, schedule, scorer, room, cache)
    seconds = clock(model.device) - start
    held = [cache.n for cache in caches]
    found = []
    for answer in answers:
        # H2O evicts for good
        own = copy.deepcopy(caches) if isinstance(caches[0], H2OCache) else caches
        found.append(read_answer(model, answer, first, own, tokens.shape[1]))
        for cache, n in zip(caches, held):
            cache.n = n
    return found, seconds


def read_answer(model, answer, first, caches, start):
    """One answer that stands at positions start, start + 1, ...; first: the prompt's logits (1, V).

    Under H2O it is read token by token, as decode would, else in one pass.
    """
    ids = torch.tensor([answer.tokens], device=model.device)        # (1, n)
    before = ids[:, :-1]
    step = 1 if isinstance(caches[0], H2OCache) else max(1, before.shape[1])
    logits = [first[:, None]]                                       # (1, 1, V)
    for i in range(0, before.shape[1], step):
        logits.append(extend(model, before[:, i:i + step], start + i, caches))
    counted = ids[0, answer.start:]
    log_p = finite(model, torch.cat(logits, 1)[0, answer.start:]).log_softmax(-1)   # (n, V)
    value = log_p.gather(1, counted[:, None]).sum().item()
    chosen = bool((log_p.argmax(-1) == counted).all())
    return [value, len(counted), chosen]


# ----------------------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class Setup:
    """What is the same for all rows and arms."""
    model: Llama
    schedule: Schedule
    predictors: Optional[nn.ModuleList] = None
    prior: float = 0.0
    share: float = 0.4              # what +h2o and +local keep of every cache
    new_tokens: int = 0             # generated in every arm; 0: answers are only read
    tokenizer: Optional[Tokenizer] = None       # to say what was generated
    score: Callable = f1            # (said, right) -> 0 to 1

    def arm(self, name):
        return parse_arm(name, self.schedule.stages, self.share)


def measure(setup, item, names, seed):
    """One row of data under every arm -> {arm's name: see measure_arm}.

    seed: the row's number, and that of random scores. Odd rows meet the arms from the last to the
    first: rows are also timed, and so nobody always follows the same arm.
    """
    known, found = {}, {}
    for name in reversed(names) if seed % 2 else names:
        try:
            found[name] = measure_arm(setup, item, setup.arm(name), seed, known)
        except ValueError as e:
            raise ValueError(f"row {seed + 1}, {name}: {e}") from None
    return {name: found[name] for name in names}


def measure_arm(setup, item, arm, seed, known):
    """One row under one arm; known: {reduction: saliency}, filled by the first arm that needs it.

    -> {"answers": see read_answers, "keep": mean share of the prompt in a block, "prefill_s"}, and
    where an answer was generated also "said", "score", "e2e_s".
    """
    prompt = torch.tensor([item.prompt], device=setup.model.device)
    text, used, keep, spent = prepare(setup, arm, prompt, item, seed, known)
    answers, seconds = read_answers(setup.model, text, item.answers, *used)
    found = {"answers": answers, "keep": keep, "prefill_s": spent + seconds}
    if setup.new_tokens:
        found |= measure_words(setup, item, text, used, spent)
    return found


def prepare(setup, arm, prompt, item, seed, known):
    """What an arm makes of a prompt (1, N); item, seed, known: of its scorer.

    -> the text that is read (1, n); by which schedule, scorer and kind of cache; the mean share of
    the prompt in a block; the seconds that this took.
    """
    L, N = len(setup.model.blocks), prompt.shape[1]
    schedule, text, spent = arm.schedule(setup.schedule, L), prompt, 0.0
    scorer = choose_scorer(setup, item, arm, schedule, seed, known)
    if arm.scorer == "compress":    # it scores the whole prompt first
        start = clock(setup.model.device)
        text = compress(setup.model, prompt, schedule, scorer)
        spent = clock(setup.model.device) - start
    elif arm.scorer == "truncate":
        text = truncate(prompt, schedule, L)
    if arm.scorer in UNPRUNED_ARMS:
        schedule, scorer = UNPRUNED, None
    keep = sum(schedule.counts(text.shape[1], L)) / L / N
    return text, (schedule, scorer, arm.cache), keep, spent


def choose_scorer(setup, item, arm, schedule, seed, known):
    """The scorer of an arm, the same on all processes; None for the full model."""
    if arm.scorer in ("full", "truncate"):
        return None
    if arm.scorer in ORACLES:
        reduce = arm.scorer.removeprefix("oracle:")
        if reduce not in known:
            known[reduce] = answer_saliency(setup, item, reduce)
        return agreed(oracle_scorer(known[reduce]))
    name = "predictor" if arm.scorer == "compress" else arm.scorer
    return agreed(make_scorer(name, setup.model, schedule, setup.predictors, seed, setup.prior))


def answer_saliency(setup, item, reduce):
    """The saliency of the prompt for its right answer, at every stage: (S, 1, N)."""
    model = setup.model
    right = item.prompt + item.answers[0].tokens
    stages = setup.schedule.after(len(model.blocks))
    tokens = torch.tensor([right], device=model.device)
    return saliency(model, tokens, len(item.prompt), stages, reduce)


def measure_words(setup, item, text, used, spent):
    """An answer in the model's own words to a prompt text (1, N): what it says, score, times.

    used: schedule, scorer and kind of cache; spent: seconds before the prefill.
    """
    new, eos = setup.new_tokens, setup.model.config.eos
    run = generate(setup.model, text, new, *used, pick=agreed(greedy), eos=())
    tokens = list(itertools.takewhile(lambda token: token not in eos, run.tokens))
    said = setup.tokenizer.decode(tokens)
    prefill_s = spent + run.prefill_s
    return {"said": said,
            "score": max(setup.score(said, right) for right in item.texts),
            "prefill_s": prefill_s,
            "e2e_s": prefill_s + run.decode_s * (new - 1)}


# ------------------------------------------------------------------------------- rows, one by one


def measure_rows(setup, items, names, log, run, quiet=False):
    """`measure` for every item -> a list of its dicts; the row's number is the seed.

    Each row is appended to the file `log` at once, and rows found there are not measured again.
    run: a text that says what they depend on.
    """
    # of several processes the first keeps the file, and says how many rows it holds
    done = [] if rank() else stored_rows(log, run)
    had = first_number(len(done))
    done = done or [None] * had
    progress = Progress(len(items), "rows", quiet, first=had)
    if had < len(items):
        progress.note("warming up")
        measure(setup, items[had], names[:2], had)      # a warm-up: rows are also timed
    path = Path(os.devnull) if rank() else log
    with path.open("a", encoding="utf-8") as f:
        for number in range(had, len(items)):
            done.append(measure(setup, items[number], names, number))
            f.write(json.dumps({"row": number, **done[-1]}) + "\n")
            f.flush()
            progress.step()
    progress.clear()
    return done


def stored_rows(log, run):
    """The rows that the file `log` holds; a new one begins with the line `run`.

    What a kill left of a last line is cut off. Raises ValueError for a file of another command.
    """
    if not log.is_file():
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(run + "\n", encoding="utf-8")
        return []
    *lines, _ = log.read_text(encoding="utf-8").split("\n")
    need(lines[:1] == [run], f"{log}: these rows belong to another command; name another file "
                             "with --rows-file")
    rows = [parse_row(line.encode(), f"{log}, line {number}", fields=())
            for number, line in enumerate(lines[1:], start=2)]
    numbers = [row.pop("row", None) for row in rows]
    need(numbers == list(range(len(rows))),
         f"{log}: its rows are not in order; name another file with --rows-file")
    os.truncate(log, sum(len(line.encode()) + 1 for line in lines))
    print(f"{len(rows)} rows are in {log} already")
    return rows


# ----------------------------------------------------------------------------------------- metrics


class Metric(NamedTuple):
    """One number a row; the metric is the sum of the values over the sum of the weights."""
    values: list
    weights: list


def ratio(values, weights):
    """Sum over sum, and its standard error (ratio estimator, rows independent): NLL per token."""
    n, total = len(values), sum(weights)
    mean = sum(values) / total
    squares = sum((value - mean * weight) ** 2 for value, weight in zip(values, weights))
    return mean, (squares * n / max(1, n - 1)) ** 0.5 / abs(total)


def mean_of(values):
    values = [float(value) for value in values]
    return Metric(values, [1.0] * len(values))


def metrics(rows, arm, task, score="f1"):
    """The metrics of one arm: {name: Metric}; score: the name of what Setup.score gives."""
    first = [row[arm]["answers"][0] for row in rows]
    nll = Metric([-value for value, _, _ in first], [count for _, count, _ in first])
    if task == "lambada":
        return {"acc": mean_of([chosen for _, _, chosen in first]), "nll": nll}
    if task != "long":
        return {"nll": nll}
    found = {score: mean_of([row[arm]["score"] for row in rows]), "nll": nll}
    return found | (speedups(rows, arm) if "full" in rows[0] else {})


def speedups(rows, arm):
    """Times of the full model over those of an arm."""
    found = {}
    for part in ("prefill", "e2e"):
        full, own = ([row[name][f"{part}_s"] for row in rows] for name in ("full", arm))
        found[f"{part}_speedup"] = Metric(full, own)
    return found


# ------------------------------------------------------------------------------------------- table


def difference(a, b):
    return [x - y for x, y in zip(a, b)]


def table(rows, arms, task, score="f1"):
    """Rows of the result, a dict for each metric and arm, from those of measure_rows."""
    by_arm = {arm: metrics(rows, arm, task, score) for arm in arms}
    found = []
    for name in by_arm[arms[0]]:
        metric = {arm: by_arm[arm][name] for arm in arms}
        for arm in arms:
            value, error = ratio(*metric[arm])
            keep = sum(row[arm]["keep"] for row in rows) / len(rows)
            row = {"scorer": arm, "metric": name, "value": value, "stderr": error, "n": len(rows),
                   "mean_keep": keep}
            if not name.endswith("speedup"):
                row |= against_full(metric, arm)
            if name == "nll":
                row |= share_of_gap(metric, arm)
            found.append(row)
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


ANSWERS = (24, 64)              # tokens: the most of a short answer, and of a middling one


def by_answer(rows, arms, task):
    """Where the arms stand on rows with short, middling and long answers: a list of groups.

    rows and task: as for `table`, which makes each group's rows. For other tasks than nll, without
    the arms full and random, or with one group alone, there is nothing to tell: [].
    """
    if task != "nll" or not {"full", "random"} <= set(arms):
        return []
    found, past = [], 0
    for most in (*ANSWERS, None):
        these = [row for row in rows if past < answer_length(row) <= (most or math.inf)]
        if len(these) > 1:
            found.append({"tokens": [past + 1, most], "n": len(these),
                          "rows": table(these, arms, task)})
        past = most
    return found if len(found) > 1 else []


def answer_length(row):
    """How many tokens of the first answer count, in a row of measure_rows."""
    return row["full"]["answers"][0][1]


def answer_range(group):
    """The answers of a group of `by_answer`, in words."""
    low, high = group["tokens"]
    return f"{low} to {high} tokens" if high else f"{low} tokens or more"


def show_answers(groups):
    """Print the share of the gap by the length of the answer, the arms as they were named."""
    heads = [f"{answer_range(group)} ({group['n']})" for group in groups]
    print(f"\n{'share of gap':18}" + "".join(f"{head:>24}" for head in heads))
    by = [{row["scorer"]: row for row in group["rows"]} for group in groups]
    for name in by[0]:
        if all("share_of_gap" in group[name] for group in by):
            shares = [f"{group[name]['share_of_gap']:.0%} +- {group[name]['share_stderr']:.0%}"
                      for group in by]
            print(f"{name:18}" + "".join(f"{share:>24}" for share in shares))


def show(rows):
    """Print the table: a block for each metric, the best arm first."""
    for metric in dict.fromkeys(row["metric"] for row in rows):
        these = [row for row in rows if row["metric"] == metric]
        paired = any("predictor_ahead" in row for row in these)
        print(f"\n{'scorer':18} {metric:>14}             kept   against full         share of gap"
              + paired * "       predictor ahead by")
        these.sort(key=lambda row: row["value"], reverse=metric != "nll")
        for row in these:
            print(line(row))


def line(row):
    text = f"{row['scorer']:18} {row['value']:14.3f} +- {row['stderr']:.3f}"
    text += f"  {row['mean_keep']:7.1%}"
    if "vs_full" in row:
        text += f"   {row['vs_full']:+.3f} +- {row['vs_full_stderr']:.3f}"
    if "share_of_gap" in row:
        text += f"   {row['share_of_gap']:8.1%} +- {row['share_stderr']:.1%}"
    if "predictor_ahead" in row:
        lead, error = row["predictor_ahead"], row["predictor_ahead_stderr"]
        text = f"{text:88}   {lead:+8.1%} +- {error:.1%}"
    return text


# ------------------------------------------------------------------------------------ command line


def options():
    parser = command_parser(__doc__)
    add_pruning_arguments(parser)
    add_data_arguments(parser, limit=100)
    parser.add_argument("--task", choices=("nll", "text", "lambada", "long"), default="nll",
                        help="see above")
    parser.add_argument("--scorers", nargs="+",
                        help="see above; default: those that suit the task")
    parser.add_argument("--h2o", type=float, default=0.4, metavar="SHARE",
                        help="what +h2o and +local keep of every KV cache")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=64,
                        help="task long: tokens generated in every arm (the text ends at eos)")
    parser.add_argument("--rouge", action="store_true",
                        help="task long: ROUGE-L instead of F1 (for summaries)")
    parser.add_argument("--rows-file", metavar="FILE", type=rows_file,
                        help="JSONL of the rows measured so far (default: a file under "
                        "out/quality/ named after the command)")
    add_tp_argument(parser)
    add_quiet_argument(parser)
    add_json_argument(parser)
    return parser


def check_task(args):
    """Refuse what the task does not read, before anything is read."""
    need(args.task == "long" or not args.rouge,
         f"--task {args.task} generates no text: leave out --rouge")
    need(args.task == "nll" or args.data, f"--task {args.task} needs --data")


def check_lengths(items, limit, new_tokens):
    """That the model's positions, `limit`, are enough for every Item, before any is measured."""
    for number, item in enumerate(items, start=1):
        longest = max(new_tokens, *(len(answer.tokens) for answer in item.answers))
        read = len(item.prompt) + longest - 1       # the last token is not read
        need(read <= limit,
             f"row {number}: a prompt of {len(item.prompt):,} tokens and an answer of {longest:,} "
             f"are more than this model's {limit:,} positions; choose a smaller --max-prompt, "
             "--max-response or --max-new-tokens")


def read_items(args, tokenizer, metadata):
    """The Items of a task."""
    if args.task == "nll":
        return [as_item(e) for e in rows_from(args, tokenizer, "heldout", metadata=metadata)]
    if args.task == "text":
        return text_items(tokenizer, args.data, args.max_prompt, args.max_response, args.limit)
    if args.task == "long":
        template, system, _ = chosen_template(args, metadata)
        return long_items(tokenizer, args.data, template, args.min_prompt, args.max_prompt,
                          args.max_response, args.question, args.limit, system)
    return lambada_items(tokenizer, args.data, args.limit)


def as_item(example):
    """An Example, whose response is the only answer."""
    ids, n = example.tokens.tolist(), example.prompt_len
    return Item(ids[:n], [Answer(ids[n:], 0)])


def identity(args, arms, setup, first):
    """A text that says what a measured row depends on; a larger --limit changes none.

    first: the first Item; it tells one format of a task from another.
    """
    model = setup.model
    given = {name: value for name, value in vars(args).items()
             if name not in ("rows_file", "json", "limit", "quiet")}
    depends = [model.blocks[0], model.norm, first]
    if setup.predictors is not None:
        depends.append(setup.predictors)
    if args.data:
        depends.append(Path(args.data))
    return json.dumps([given, arms, asdict(setup.schedule), setup.prior, str(model.dtype),
                       str(model.device), digest(*depends)])


def check_window(setup, items, arms):
    """That no row meets H2O and a sliding window that is too short for it, before any is read."""
    window = setup.model.config.window
    if not window or setup.share == 1 or not any("+" in name for name in arms):
        return
    for number, item in enumerate(items, start=1):
        new = max(setup.new_tokens, *(len(answer.tokens) for answer in item.answers))
        need(len(item.prompt) + new - 1 <= window, f"row {number}: {NO_WINDOW}")


def describe(args, setup, lengths):
    schedule, blocks = setup.schedule, len(setup.model.blocks)
    after = schedule.after(blocks)
    dropped = 1 - schedule.share(len(after))
    print(f"{args.ckpt}, {args.task}: {len(lengths)} rows, prompts of {min(lengths)} to "
          f"{max(lengths)} tokens, stages after blocks {after}, keep {schedule.keep}: "
          f"{dropped:.0%} dropped by the last stage", flush=True)


def main():
    args = options().parse_args()
    check_task(args)
    tokenizer = Tokenizer(args.ckpt)
    pruning = read_pruning(args)        # what can be refused is refused before weights are read
    prior = pruning.metadata.get("prior", 0.0)
    trained = pruning.predictors is not None
    arms = args.scorers or default_arms(args.task, trained, prior, args.tp)
    for name in arms:
        parse_arm(name, 1, args.h2o)
    items = read_items(args, tokenizer, pruning.metadata)
    lengths = [len(item.prompt) for item in items]
    new_tokens = args.max_new_tokens if args.task == "long" else 0
    check_lengths(items, pruning.config.max_positions, new_tokens)
    print(pruning.said(args))
    model, schedule, predictors, _ = load_pruning(args, pruning)
    setup = Setup(model, schedule, predictors, prior, args.h2o, new_tokens, tokenizer,
                  score=rouge_l() if args.rouge else f1)
    check_window(setup, items, arms)
    describe(args, setup, lengths)
    start, run = time.time(), identity(args, arms, setup, items[0])
    log = Path(args.rows_file or Path("out", "quality", f"{args.task}-{digest(run)}.jsonl"))
    done = measure_rows(setup, items, arms, log, run, args.quiet)
    if rank():
        return
    rows = table(done[:len(items)], arms, args.task, "rouge_l" if args.rouge else "f1")
    show(rows)
    mean = sum(lengths) / len(lengths)
    told = {"task": args.task, "data": args.data and Path(args.data).name,
            "seconds": time.time() - start, "schedule": asdict(schedule),
            "prompt_tokens": [min(lengths), mean, max(lengths)], "rows": rows}
    if groups := by_answer(done[:len(items)], arms, args.task):
        show_answers(groups)
        told["by_answer"] = groups
    print_json(args, model, told)


if __name__ == "__main__":
    cli(main)
