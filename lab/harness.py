"""Tasks of lm-evaluation-harness on pruned prompts (Section 4.2; Table 3).

lm-evaluation-harness (the package lm_eval) knows thousands of tasks: it writes the prompts, and
scores what a model says to them. Here the model is ours, in one arm after the other. A context is
read, and pruned, once; every continuation is then read on its caches.

    pip install lm_eval==0.4.13
    python -m lab.harness --ckpt smollm2 --tasks piqa boolq --limit 100
    python -m lab.harness --ckpt smollm2 --tasks winogrande --num-fewshot 5 \\
        --scorers full predictor predictor@5 recent
    python -m lab.harness --ckpt smollm2 --tasks copa piqa lambada_openai --data DIR    # offline

--tasks names tasks, groups or tags of lm_eval. Their rows come from the Hugging Face Hub. With
--data the tasks are the same in all else, but read JSONL files in that folder: a task's file is
TASK.jsonl, or the longest name that is a part of it (lambada_openai: lambada.jsonl). Few-shot
examples are then other rows of the same file.

The scorers are those of lab.quality, but for the oracles: what is right is not known here; +h2o
and +local keep 40% of a cache. Tables and warnings are lm_eval's own. Below the tables stands by
how much a scorer's mean over rows differs from the full model's, paired by row, for the scorers
that are named after full.

lm_eval itself cuts a text into context and continuation. Contexts that are too long lose their
first tokens, as many as in lm_eval's own models. A context that is empty, or white space alone, is
read as the begin-of-text token. A task that asks for the likelihood of a whole text has no prompt
to prune, and is refused.

What was read is kept under out/harness/: the same command goes on where it was stopped.
"""
from dataclasses import asdict
from itertools import groupby
from numbers import Real
from pathlib import Path
from statistics import fmean

import torch

from infer import generate
from lab.quality import Setup, against_full, error, mean_of, parse_arm, prepare, read_answers
from lab.tasks import Answer
from model import Tokenizer
from prune import load_pruning
from support import options
from support.files import need
from support.rows import digest, read_rows
from support.runs import Measured, Progress

# ----------------------------------------------------------------------------------------- a model


class Pruned:
    """What our model in one arm adds to lm_eval's TemplateLM; see `harness_model`.

    setup: a lab.quality.Setup with a tokenizer. name: the arm's. measured: a support.runs.Measured.
    shares: what the arm kept of each context that it was asked about, a mean over blocks.
    """

    def __init__(self, setup, name, measured, quiet=True):
        super().__init__()
        need(not name.startswith("oracle"), f"{name} needs to know the right answer, and lm_eval "
                                            "does not tell it: leave it out")
        self.arm = parse_arm(name, setup.schedule.stages, setup.share)
        self.setup, self.name, self.measured = setup, name, measured
        self.limit = setup.model.config.max_positions
        self.progress, self.shares = Progress(quiet=quiet), []

    @property
    def eot_token_id(self):
        """lm_eval takes it for its prefix_token_id, which stands for an empty context."""
        return self.setup.tokenizer.prefix

    def tok_encode(self, string, add_special_tokens=True):
        return self.setup.tokenizer.encode(string, bos=add_special_tokens)

    def once(self, context, read, *asked):
        """read(model, text, *asked, schedule, scorer, cache), now or earlier; JSON knows all of it.

        text (1, n) is the context as the arm prunes it. Random scores follow from the context
        alone: neither order nor number of rows changes them.
        """
        def now():
            tokens = torch.tensor([context], device=self.setup.model.device)
            reading = prepare(self.setup, self.arm, tokens, None, int(digest(context), 16), {})
            return reading.keep, read(reading.model, reading.text, *asked, *reading.how)

        share, result = self.measured.get([self.name, context, *asked], now)
        self.shares.append(share)
        self.progress.note(f"{self.name}: {len(self.shares)} contexts are read")
        return result

    def _loglikelihood_tokens(self, requests, **kwargs):
        """(text, context, continuation) -> (log-likelihood, is it the model's own choice).

        Contexts and continuations are token ids. Neighbours with one context are read together.
        """
        def fitting(request):
            _, context, continuation = request
            need(continuation, "a continuation has no tokens of its own")
            room = self.limit + 1 - len(continuation)               # the last token is not read
            return (context or [self.prefix_token_id])[-room:]      # [] is left of white space

        found = []
        for context, group in groupby(requests, fitting):
            answers = [Answer(continuation, 0) for *_, continuation in group]
            read, _ = self.once(context, read_answers, answers)
            found += [(value, chosen) for value, _, chosen in read]
        return found

    def loglikelihood_rolling(self, requests):
        raise ValueError("a task that asks for the likelihood of a whole text has no prompt, so "
                         "there is nothing to prune: leave it out")

    def generate_until(self, requests):
        return [self.write(*request.args) for request in requests]

    def write(self, text, wanted):
        """The likeliest text after a text; wanted: a task's generation_kwargs."""
        from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
        wanted, decode = normalize_gen_kwargs(wanted), self.setup.tokenizer.decode
        need(not wanted["do_sample"], "this task draws its texts by chance (do_sample): here a "
                                      "text is the likeliest one")
        new, until = wanted["max_gen_toks"], wanted["until"]

        def said(tokens):           # up to the first of the texts that end it
            return postprocess_generated_text(decode(tokens), until, None)

        def read(model, prompt, new, until, *used):
            return generate(model, prompt, new, *used,
                            stop=lambda tokens: said(tokens) != decode(tokens)).tokens

        context = (self.tok_encode(text) or [self.prefix_token_id])[-(self.limit - new):]
        return said(self.once(context, read, new, until))


def harness_model(*given):
    """Pruned(*given) as a model of lm_eval, whose own code cuts texts into pairs."""
    from lm_eval.api.model import TemplateLM
    return type("Model", (Pruned, TemplateLM), {})(*given)


# ------------------------------------------------------------------------------ tasks and results


def local_task(name, folder):
    """For lm_eval: a task that it knows, with the rows of a file in a folder and no others."""
    from datasets import Dataset
    fit = [file for file in Path(folder).glob("*.jsonl") if f"_{file.stem}_" in f"_{name}_"]
    need(fit, f"{folder}: no rows for {name}, expected a file {name}.jsonl")
    rows = read_rows(max(fit, key=lambda file: len(file.name)), fields=())
    for row in rows:
        if row.get("label") in ("false", "true"):                   # on the Hub 0 and 1
            row["label"] = int(row["label"] == "true")
    splits = {"rows": Dataset.from_list(rows)}
    task = {"task": name, "custom_dataset": lambda **given: splits, "test_split": "rows",
            "fewshot_split": "rows"}
    return {"group": "local", "task": [task]}       # lm_eval looks up the rest of a group's tasks


def find_tasks(manager, name, data):
    """A task, a group or a tag -> lm_eval's dict {"tasks": {name: Task}, "groups": ...}.

    manager: lm_eval's TaskManager. data: a folder of rows, or None; it takes tasks only.
    """
    try:
        return manager.load([local_task(name, data) if data else name])
    except Exception as e:          # of many packages, each has its own
        raise ValueError(f"{name}: lm_eval cannot load this task from {data or 'the Hub'} "
                         f"({type(e).__name__}: {e})") from None


def measure(model, found, limit, shots):
    """Tasks as `find_tasks` gives them under a `harness_model` -> lm_eval's results.

    limit: rows of each task, None: all. shots: few-shot examples, None: the task's own number; a
    task that has none by its nature stays so.
    """
    from lm_eval import evaluate
    for task in found["tasks"].values():
        task.set_fewshot_seed(1234)             # lm_eval's own; all arms meet the same examples
        if shots is not None and task.config.num_fewshot != 0:
            task.config.num_fewshot = shots
    return evaluate(model, found, limit=limit, bootstrap_iters=1000)


def table(results, arm, keep):
    """Rows of an arm, a dict for each task and metric; results: {arm: lm_eval's}.

    keep: the share of the prompts that stood in a block.
    """
    for task, values in results[arm]["results"].items():
        for key, error in values.items():
            name, _, kind = key.partition("_stderr,")
            if kind:                            # a metric's filter, mostly "none"
                value = values[f"{name},{kind}"]
                yield {"task": task, "metric": f"{name},{kind}".removesuffix(",none"),
                       "scorer": arm, "value": value, "stderr": error,
                       "n": values["sample_len"], "mean_keep": keep,
                       **paired(results, arm, task, name, kind, value)}


def paired(results, arm, task, name, kind, value):
    """A mean's difference from the full model's, paired by row; {} if value is no mean of rows."""
    metric = {each: mean_of(row[name] for row in result["samples"].get(task, ())
                            if row["filter"] == kind and isinstance(row.get(name), Real))
              for each, result in results.items()}
    own = metric[arm].values
    return against_full(metric, arm) if own and abs(fmean(own) - value) < 1e-9 else {}


# ------------------------------------------------------------------------------------ command line


def harness_options():
    parser = options.command_parser(__doc__)
    options.add_pruning_options(parser)
    parser.add_argument("--tasks", nargs="+", required=True, help="see above")
    parser.add_argument("--scorers", nargs="+", help="see above (default: %(default)s)",
                        default="full predictor random recent attention".split())
    parser.add_argument("--num-fewshot", type=options.at_least(0), help="solved examples before a "
                        "prompt (default: the task's own number, mostly 0)")
    parser.add_argument("--limit", type=options.at_least(1),
                        help="at most this many rows of each task")
    parser.add_argument("--data", help="a folder of JSONL files, see above")
    return parser.parse_args()


def main():
    args, rows = harness_options(), []
    try:
        import lm_eval.tasks
    except ImportError as e:
        raise ImportError("lab.harness needs the optional package lm_eval: pip install "
                          f"lm_eval==0.4.13 ({e})") from None
    manager = lm_eval.tasks.TaskManager()
    found = [find_tasks(manager, name, args.data) for name in args.tasks]
    model, schedule, predictors = load_pruning(args)
    setup = Setup(model, schedule, predictors, tokenizer=Tokenizer(args.ckpt))
    run = digest(model, asdict(model.config), predictors or "", schedule, model.dtype,
                 model.device)
    measured = Measured(f"out/harness/{run}.jsonl", run)
    for tasks in found:
        results = {}
        for arm in [harness_model(setup, name, measured, args.quiet) for name in args.scorers]:
            results[arm.name] = measure(arm, tasks, args.limit, args.num_fewshot)
            keep = fmean(arm.shares)
            print(f"\n{arm.name}, {keep:.1%} of the prompts kept")
            print(lm_eval.utils.make_table(results[arm.name]))
            rows += table(results, arm.name, keep)
    for row in rows:
        if "vs_full" in row:
            print(f"{row['scorer']}, {row['task']} {row['metric']}: {row['vs_full']:+.3f}"
                  f"{error(row['vs_full_stderr'])} against full")
    options.print_json(args, model, {
        "num_fewshot": args.num_fewshot, "lm_eval": lm_eval.__version__,
        "schedule": asdict(schedule), "rows": rows})


if __name__ == "__main__":
    options.cli(main)
