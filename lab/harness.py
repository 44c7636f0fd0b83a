"""Tasks of lm-evaluation-harness on pruned prompts (Section 4.2; Table 3).

lm-evaluation-harness (the package lm_eval) knows thousands of tasks: it writes the prompts, and
scores what a model says to them. Here the model is ours, in one arm after the other. A context is
read, and pruned, once; every continuation is then read on its caches.

    pip install lm_eval==0.4.13
    python -m lab.harness --ckpt smollm2 --tasks piqa boolq --limit 100
    python -m lab.harness --ckpt smollm2 --tasks winogrande --num-fewshot 5 \\
        --scorers full predictor predictor@5 recent
    python -m lab.harness --ckpt smollm2 --tasks copa piqa lambada_openai --data DIR    # offline

--tasks names tasks, groups or tags of lm_eval, or of the yaml files under --tasks-dir. Their rows
come from the Hugging Face Hub. With --data the tasks are the same in all else, but read JSONL
files in that folder: a task's file is TASK.jsonl, or the longest name that is a part of it
(lambada_openai: lambada.jsonl). Few-shot examples are then other rows of the same file.

A value that is a mean over rows has a standard error and, paired by row, a difference from the
full model; others (a perplexity, a group of tasks) have none.

The scorers are those of lab.quality, @STAGES, +h2o, +local and compress included, but for the
oracles: what is right is not known here. Encoding, the empty context (begin-of-text stands for
it) and the cut of contexts that are too long, from the left, are lm_eval's own. A task that asks
for the likelihood of a whole text has no prompt, so nothing to prune: it takes --scorers full.

What was read is kept in --rows-file: the same command goes on where it was stopped.

Shapes: B = 1 context, N tokens of it, L blocks.
"""
import importlib.metadata
import json
import logging
import math
import os
import time
from dataclasses import asdict
from itertools import chain
from numbers import Real
from pathlib import Path

import torch

from lab.quality import (ORACLES, Setup, default_arms, difference, line, mean_of, parse_arm,
                         prepare, ratio, read_answers, stored_rows)
from lab.tasks import Answer
from model import Tokenizer
from prune import extend, prefill
from support.data import digest
from support.files import need
from support.options import (add_json_argument, add_pruning_arguments, add_quiet_argument,
                             at_least, cli, command_parser, print_json, rows_file)
from support.progress import counted
from support.sampling import finite, greedy
from support.saved import load_pruning, read_pruning

WANTED = "pip install lm_eval==0.4.13"
SHOTS_SEED = 1234                   # lm_eval's own: the same examples as its command line draws
NEW_TOKENS = 256                    # its own too, where a task does not say how many

NO_PROMPT = ("this task asks for the likelihood of whole texts: there is no prompt to prune, so it "
             "takes --scorers full alone")

# ------------------------------------------------------------------------------ reading, in one arm


class Kept:
    """What was measured, by a key; in the JSONL file `log` too, where there is one.

    run: a text that says what all in it depends on.
    """

    def __init__(self, log=None, run=""):
        rows = stored_rows(log, run) if log else []
        self.log, self.found = log, {row["key"]: row["value"] for row in rows}

    def get(self, key, measure):
        """What measure() says, JSON, now or earlier."""
        key = digest(key)
        if key not in self.found:
            self.found[key] = measure()
            if self.log:
                row = {"row": len(self.found) - 1, "key": key, "value": self.found[key]}
                with self.log.open("a", encoding="utf-8") as f:
                    f.write(json.dumps(row) + "\n")
        return self.found[key]


class Reader:
    """One arm at work: contexts are lists of token ids, at least one.

    kept: what it need not read again. shares: what it kept of each context, a mean over blocks.
    cut: how many requests were too long.
    """

    def __init__(self, setup, name, quiet=True, kept=None):
        self.setup, self.name, self.quiet = setup, name, quiet
        self.kept = kept or Kept()
        self.arm = setup.arm(name)
        self.limit = setup.model.config.max_positions
        self.shares, self.cut = [], 0

    def shorten(self, context, room):
        """The last tokens of a context that has room for so many."""
        self.cut += len(context) > room
        return context[-room:]

    def prepare(self, context):
        """-> what is read, tokens (1, N); by which schedule, scorer and kind of cache; the share.

        Random scores follow from the context alone: neither order nor number of rows changes them.
        """
        prompt = torch.tensor([context], device=self.setup.model.device)
        seed = int(digest(context), 16)
        text, used, share, _ = prepare(self.setup, self.arm, prompt, None, seed, {})
        return text, used, share

    def once(self, context, measure, *asked):
        """measure(context, *asked) -> share, result; the result, if need be from `kept`."""
        key = [self.name, context, *asked]
        share, result = self.kept.get(key, lambda: measure(context, *asked))
        self.shares.append(share)
        return result

    def read(self, pairs, quiet=True):
        """(context, continuation), both token ids -> [(log-likelihood, is it the model's choice)].

        Pairs of the same context are read together.
        """
        groups = {}
        for number, (context, continuation) in enumerate(pairs):
            n = len(continuation)
            need(0 < n <= self.limit, f"a continuation of {n:,} tokens: expected 1 to "
                                      f"{self.limit:,}, this model's positions")
            context = self.shorten(context, self.limit + 1 - n)     # the last token is not read
            groups.setdefault(tuple(context), []).append(number)
        found = [None] * len(pairs)
        for context, numbers in counted(list(groups.items()), f"contexts, {self.name}", quiet):
            continuations = [list(pairs[number][1]) for number in numbers]
            values = self.once(list(context), self.likelihoods, continuations)
            for number, (value, chosen) in zip(numbers, values):
                found[number] = value, chosen
        return found

    def likelihoods(self, context, continuations):
        """-> the share kept of a context, and `read`'s pair for each continuation."""
        tokens, used, share = self.prepare(context)
        answers = [Answer(continuation, 0) for continuation in continuations]
        read, _ = read_answers(self.setup.model, tokens, answers, *used)
        return share, [(value, chosen) for value, _, chosen in read]

    def write(self, context, new, stops):
        """The likeliest text after a context: at most `new` tokens, up to an eos or a stop string.

        stops: strings; the text ends before the first of them.
        """
        need(new < self.limit, f"{new:,} new tokens leave no room for a prompt in this model's "
                               f"{self.limit:,} positions")
        return self.once(self.shorten(context, self.limit - new), self.continued, new, stops)

    @torch.no_grad()
    def continued(self, context, new, stops):
        """-> the share kept of a context, and the text after it."""
        setup, said = self.setup, []
        tokens, (schedule, scorer, cache), share = self.prepare(context)
        N = tokens.shape[1]
        logits, caches, _ = prefill(setup.model, tokens, schedule, scorer, new, cache)
        for pos in range(N, N + new):
            token = greedy(finite(setup.model, logits))             # (1, 1)
            said.append(token.item())
            if said[-1] in setup.model.config.eos:
                return share, setup.tokenizer.decode(said[:-1])
            text = setup.tokenizer.decode(said)
            if any(stop in text for stop in stops):
                return share, before(text, stops)
            logits = extend(setup.model, token, pos, caches)[:, -1]
        return share, setup.tokenizer.decode(said)


def before(text, stops):
    """A text up to the first of several strings, of which it holds one."""
    return text[:min(text.find(stop) for stop in stops if stop in text)]


# ------------------------------------------------------------------------------ lm_eval's own parts


def lm_eval_parts():
    """What is used of lm_eval. Raises ImportError that says how to get it."""
    os.environ.setdefault("TQDM_DISABLE", "1")      # how far the work is, is said here alone
    try:
        import datasets
        import lm_eval.api.model
        import lm_eval.evaluator
        import lm_eval.models.utils
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as e:
        wanted = f"lab.harness needs the optional package lm_eval: {WANTED} ({e})"
        raise ImportError(wanted) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    return lm_eval


def harness_model(reader):
    """A Reader as a model of lm_eval, whose own code cuts a text into context and continuation."""
    lm_eval = lm_eval_parts()
    setup, tokenizer = reader.setup, reader.setup.tokenizer

    class Pruned(lm_eval.api.model.TemplateLM):
        eot_token_id = next(iter(setup.model.config.eos), None)

        @property
        def prefix_token_id(self):
            need(tokenizer.prefix is not None,
                 "a context is empty, and this tokenizer has no token to begin with")
            return tokenizer.prefix

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode(string, bos=add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests, **kwargs):
            return reader.read([pair for _, *pair in requests], reader.quiet)

        def loglikelihood(self, requests, disable_tqdm=True):
            return super().loglikelihood(requests, disable_tqdm)

        def loglikelihood_rolling(self, requests, disable_tqdm=True):
            need(reader.name == "full", NO_PROMPT)
            texts = [request.args[0] for request in requests]
            return [self.whole_text(text) for text in counted(texts, "texts, full", reader.quiet)]

        def whole_text(self, text):
            """The log-likelihood of a text, in windows where it is too long for one."""
            windows = lm_eval.utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, reader.limit, context_len=1)
            pairs = [lm_eval.utils.make_disjoint_window(window) for window in windows]
            return sum(value for value, _ in reader.read(pairs))

        def generate_until(self, requests, disable_tqdm=True):
            asked = [request.args for request in requests]
            what = f"texts, {reader.name}"
            return [self.continued(*args) for args in counted(asked, what, reader.quiet)]

        def continued(self, text, options):
            """What the model writes after a text, as a task's generation_kwargs want it."""
            options = lm_eval.models.utils.normalize_gen_kwargs(options, NEW_TOKENS)
            need(not options["do_sample"], "this task draws its texts by chance (do_sample): here "
                                           "a text is the likeliest one")
            context = self.tok_encode(text) or [self.prefix_token_id]
            stops = list(filter(None, options["until"]))    # an empty string stops nothing
            return reader.write(context, options["max_gen_toks"], stops)

    return Pruned()


# -------------------------------------------------------------------------------------------- tasks


def data_file(folder, task):
    """The JSONL file in a folder that holds a task's rows."""
    names = [file.stem for file in sorted(Path(folder).glob("*.jsonl"))]
    fit = [name for name in names if f"_{name}_" in f"_{task}_"]
    need(fit, f"{folder}: no rows for {task}, expected a file {task}.jsonl")
    return Path(folder) / f"{max(fit, key=len)}.jsonl"


def numbered(rows):
    """The same rows; labels "false" and "true" are 0 and 1, as on the Hub."""
    number = {"false": 0, "true": 1}
    if "label" not in rows.features or not {str(x).lower() for x in rows["label"]} <= set(number):
        return rows
    return rows.map(lambda row: {"label": number[str(row["label"]).lower()]})


def local_task(entry, file):
    """For lm_eval: a task that it knows, with the rows of a file and no others."""
    rows = {"dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": {"rows": str(file.resolve())}},
            "training_split": None, "validation_split": None, "test_split": "rows",
            "fewshot_split": "rows"}
    if "process_docs" not in entry.cfg:
        rows["process_docs"] = numbered
    return {"group": f"local {entry.name}", "task": [{"task": entry.name, **rows}]}


def find_tasks(manager, name, folder=None):
    """A task, a group or a tag -> lm_eval's dict {"tasks": {name: Task}, "groups": ...}."""
    need(name in manager.all_tasks, f"lm_eval knows no task {name!r}")
    if folder is None:
        return load_tasks(manager, name, name, "the Hub (--data DIR reads rows from a file)")
    need(name in manager.all_subtasks, f"{name} stands for several tasks: with --data, name each")
    file = data_file(folder, name)
    spec = local_task(manager.task_index[name], file)
    tasks = load_tasks(manager, name, spec, file)["tasks"]
    check_answers(tasks[name], file)
    return {"tasks": tasks}


def load_tasks(manager, name, spec, source):
    """What lm_eval makes of a name or a dict; source: where the rows come from."""
    try:
        return manager.load([spec])
    except Exception as e:          # of many packages, each has its own
        fault = f"{type(e).__name__}: {e}"
        raise ValueError(f"{name}: no rows of this task from {source} ({fault})") from None


def check_answers(task, file):
    """That the right answer of every row is a choice: lm_eval would count others as wrong."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for number, row in enumerate(task.eval_docs, start=1):
        choices = task.doc_to_choice(row)
        right = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
        for one in right if isinstance(right, list) else [right]:
            there = one in choices if isinstance(one, str) else one in range(len(choices))
            need(there, f"{file}, row {number}: its right answer, {one!r:.60}, is no choice: "
                        f"expected a number from 0 to {len(choices) - 1}, or the choice itself")


def set_shots(tasks, shots):
    """How many few-shot examples there are; a task that has none by its nature stays so."""
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        if own is None or shots is not None and own != 0:
            task.set_config(key="num_fewshot", value=shots or 0)


def evaluate(reader, found, limit=None):
    """Tasks as `find_tasks` gives them, in one arm -> lm_eval's results, with every sample."""
    for task in found["tasks"].values():
        task.set_fewshot_seed(SHOTS_SEED)       # so that all arms meet the same examples
    return lm_eval_parts().evaluator.evaluate(harness_model(reader), found, limit=limit,
                                              bootstrap_iters=0, log_samples=True)


# -------------------------------------------------------------------------------------------- table


def table(results, shares):
    """Rows of the result, a dict for each task, metric and arm; results: {arm: see evaluate}.

    shares: {arm: the share of the prompts that stood in a block}.
    """
    first = next(iter(results.values()))["results"]
    rows = []
    for task, metrics in first.items():
        for metric in filter(is_metric, metrics):
            rows += [table_row(results, task, metric, arm) | {"mean_keep": shares[arm]}
                     for arm in results]
    return rows


def is_metric(name):
    """Of the names in lm_eval's results: "acc,none" is a metric with its filter."""
    return "," in name and "_stderr," not in name


def table_row(results, task, metric, arm):
    """One number of one arm, and its difference from the full model, paired by sample."""
    name, kind = metric.split(",", 1)
    found = results[arm]["results"][task]
    own = samples(results[arm], task, metric)
    row = {"task": task, "metric": name if kind == "none" else metric, "scorer": arm,
           "value": float(found[metric]), "stderr": ratio(*mean_of(own))[1] if own else None,
           "n": found.get("sample_len")}
    full = "full" in results and arm != "full" and samples(results["full"], task, metric)
    if own and full and len(own) == len(full):
        value, error = ratio(*mean_of(difference(own, full)))
        row |= {"vs_full": value, "vs_full_stderr": error}
    return row


def samples(result, task, metric):
    """One value a sample; [] where there is none, or where the metric is not simply their mean."""
    name, kind = metric.split(",", 1)
    rows = [row for row in result["samples"].get(task, ()) if row["filter"] == kind]
    values = [row.get(name) for row in sorted(rows, key=lambda row: row["doc_id"])]
    if not values or not all(isinstance(value, Real) for value in values):
        return []
    mean = sum(map(float, values)) / len(values)
    return values if math.isclose(mean, result["results"][task][metric], abs_tol=1e-9) else []


def show(rows):
    """Print the table: a block for each task and metric."""
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in rows):
        these = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
        print(f"\n{task}, {these[0]['n']} rows\n{'scorer':18} {metric:>14}             kept   "
              "against full")
        for row in these:
            error = math.nan if row["stderr"] is None else row["stderr"]
            print(line({**row, "stderr": error}))


# ------------------------------------------------------------------------------------- command line


def options():
    parser = command_parser(__doc__)
    add_pruning_arguments(parser)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="see above")
    parser.add_argument("--scorers", nargs="+", help="see above (default: full, what is trained, "
                        "random, recent, attention)")
    parser.add_argument("--num-fewshot", type=at_least(0), metavar="N", help="solved examples "
                        "before a prompt (default: the task's own number, mostly 0)")
    parser.add_argument("--limit", type=at_least(1), help="at most this many rows of each task")
    parser.add_argument("--data", metavar="DIR", help="a folder of JSONL files, see above")
    parser.add_argument("--tasks-dir", metavar="DIR", help="a folder of yaml files, tasks of your "
                        "own in lm_eval's format")
    parser.add_argument("--h2o", type=float, default=0.4, metavar="SHARE",
                        help="what +h2o and +local keep of every KV cache")
    parser.add_argument("--rows-file", metavar="FILE", type=rows_file,
                        help="JSONL of what was read so far (default: a file under out/harness/ "
                        "named after model, predictors and schedule)")
    add_quiet_argument(parser)
    add_json_argument(parser)
    return parser


def identity(setup):
    """A text that says what every result depends on, whatever the task."""
    model, depends = setup.model, [setup.model.blocks[0], setup.model.norm]
    if setup.predictors is not None:
        depends.append(setup.predictors)
    return json.dumps([asdict(setup.schedule), setup.prior, setup.share, str(model.dtype),
                       str(model.device), digest(*depends)])


def check_arms(arms, share):
    """Refuse names that say nothing, and scorers that need the answer."""
    for name in arms:
        scorer = parse_arm(name, 1, share).scorer
        need(scorer not in ORACLES, f"{name} needs to know the right answer: no scorer for lm_eval")


def check_tasks(found, arms):
    """Refuse tasks without prompts, unless nothing is pruned."""
    tasks = chain.from_iterable(group["tasks"].values() for group in found)
    whole = any(task.OUTPUT_TYPE == "loglikelihood_rolling" for task in tasks)
    need(arms == ["full"] or not whole, NO_PROMPT)


def measure(setup, arms, found, limit, quiet, kept=None):
    """Tasks under every arm -> rows of the table, and how many requests were cut."""
    results, shares, cut = {}, {}, 0
    for name in arms:
        reader = Reader(setup, name, quiet, kept)
        results[name] = evaluate(reader, found, limit)
        shares[name] = sum(reader.shares) / len(reader.shares)
        cut = reader.cut
    return table(results, shares), cut


def main():
    args = options().parse_args()
    for folder in filter(None, (args.data, args.tasks_dir)):
        need(Path(folder).is_dir(), f"{folder}: no such folder")
    lm_eval = lm_eval_parts()
    tokenizer = Tokenizer(args.ckpt)
    pruning = read_pruning(args)
    prior = pruning.metadata.get("prior", 0.0)
    arms = args.scorers or default_arms(None, pruning.predictors is not None, prior, tp=False)
    check_arms(arms, args.h2o)
    manager = lm_eval.tasks.TaskManager(include_path=args.tasks_dir)
    found = {name: find_tasks(manager, name, args.data) for name in args.tasks}
    check_tasks(found.values(), arms)
    for tasks in found.values():
        set_shots(tasks["tasks"], args.num_fewshot)
    print(pruning.said(args))
    model, schedule, predictors, _ = load_pruning(args, pruning)
    setup = Setup(model, schedule, predictors, prior, args.h2o, tokenizer=tokenizer)
    start, rows, run = time.time(), [], identity(setup)
    kept = Kept(Path(args.rows_file or Path("out", "harness", f"{digest(run)}.jsonl")), run)
    for tasks in found.values():
        these, cut = measure(setup, arms, tasks, args.limit, args.quiet, kept)
        show(these)
        if cut:
            print(f"{cut} requests were cut from the left to this model's positions")
        rows += these
    told = {"tasks": args.tasks, "data": args.data and Path(args.data).name,
            "num_fewshot": args.num_fewshot, "limit": args.limit,
            "lm_eval": importlib.metadata.version("lm_eval"),
            "seconds": time.time() - start, "schedule": asdict(schedule), "rows": rows}
    print_json(args, model, told)


if __name__ == "__main__":
    cli(main)
