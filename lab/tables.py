"""Every measured table, written from the files in results/, so that none drifts from its numbers.

A table stands in README.md or docs/results.md after `<!-- table NAME -->`; what lies between that
and `<!-- end -->` is replaced.

    python -m lab.tables            # write the tables
    python -m lab.tables --check    # exit 1 if a table there is not what results/ says
    python -m lab.tables --figures  # also draw the curves of results/ (needs matplotlib)
"""
import ast
import re
import statistics
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

from lab.figures import cost_against_length, curve, tradeoff
from lab.plan import SHAPES, plan
from lab.quality import answer_range
from prune import Schedule, flops_row
from support.places import ROOT
from support.files import need, read_json
from support.options import cli, command_parser

PAGES = ("README.md", "docs/results.md")
NAMES = {
    "full": "full model",
    "predictor": "**trained predictors**",
    "prior": "trained predictors + position prior",
    "random": "random",
    "neighbours": "trained predictors + neighbours",
    "recent": "latest tokens",
    "earliest": "first tokens",
    "norm": "largest hidden state",
    "attention": "attention received, all queries",
    "attention16": "attention received, last 16 queries",
    "expected": "expected attention",
    "truncate": "the text's first tokens alone",
    "oracle:norm_gx": "gradient oracle, norm of g * x (needs the answer: a ceiling)",
    "oracle:norm_g": "gradient oracle, norm of g",
    "oracle:abs_dot": "gradient oracle, abs(g . x), the literal Eq. 3",
    "predictor@5": "trained predictors, 5 stages (SDTP-low)",
    "compress": "prompt compression by the same scores",
    "full+h2o": "H2O at 40%",
    "full+local": "latest 40% only",
    "predictor+h2o": "trained predictors + H2O at 40%",
}
# Modules that had another name when results/ was measured.
MOVED = {
    "python eval.py": "python -m lab.quality",
    "python study.py": "python -m lab.ablations",
    "python infer.py --ckpt smollm2 --bench": "python -m lab.speed --ckpt smollm2 --lengths",
}


# ---------------------------------------------------------------------------------- cells and text


def plus(value, error, digits=3):
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def percent(value, error):
    return f"{value:.0%} ± {error:.0%}"


def points(value, error):
    """Two fractions as percentage points."""
    return plus(100 * value, 100 * error, 1)


def likelihood(row):
    return plus(row["value"], row["stderr"])


def called(scorer):
    """A scorer's name in a table."""
    base = scorer.removesuffix("@cut")
    name = NAMES.get(base, base)
    return name if base == scorer else f"{name}, one early cut"


def share(row):
    """Where a row stands between random (0%) and full (100%)."""
    if "share_of_gap" in row:
        return percent(row["share_of_gap"], row["share_stderr"])
    return {"full": "100%", "random": "0%"}[row["scorer"]]


def ahead(row):
    """How much of the gap the trained predictors lie before a row; nothing for themselves."""
    if "predictor_ahead" not in row:
        return ""
    return f"{row['predictor_ahead']:+.0%} ± {row['predictor_ahead_stderr']:.0%}"


def markdown(head, rows):
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def result(name):
    path = ROOT / "results" / f"{name}.json"
    need(path.is_file(), f"{path}: not measured yet; see results/make.sh")
    return read_json(path)


def renamed(command):
    """A command as it is called today."""
    for old, new in MOVED.items():
        command = command.replace(old, new)
    return command


def source(names, found, up=""):
    """What stands under a table: command, files, time, hardware, type and commit.

    names: of files in results/; found: what is in them; up: the way from the page to the root.
    """
    def each(key):
        return ", ".join(dict.fromkeys(str(one[key]) for one in found))

    more = " and the like" if len(names) > 1 else ""
    links = ", ".join(f"[{name}.json]({up}results/{name}.json)" for name in names)
    seconds = sum(one.get("seconds") or 0 for one in found)
    spent = f"{seconds:.0f} s on " if seconds else ""
    if seconds > 90:
        spent = f"{seconds / 60:.0f} min on "
    return (f"`{renamed(found[0]['command'])}`{more} ({links}; "
            f"{spent}{each('hardware')}, {each('dtype')}; commit {each('commit')})")


# ------------------------------------------------------------------------- where the equations are

MODULES = ("model", "saliency", "predictor", "prune", "train", "infer")
EQUATIONS = ("module", "mask", "saliency, literally", "MSE", "ranking, all stages",
             "ranking, one stage", "cross entropy", "the whole loss")


def around(text, line):
    """The dotted name of the functions and classes around a line of a module."""
    named = (ast.FunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, named)]
    return ".".join(node.name for node in nodes if node.lineno <= line <= node.end_lineno)


def marked():
    """Every line of the six modules that ends in `# Eq. n` -> {n: (file, line, around, code)}."""
    found = {}
    for name in MODULES:
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        for line, code in enumerate(text.splitlines(), start=1):
            mark = re.search(r"^ *(.*?) +# Eq\. (\d+)$", code)
            if mark:
                found[int(mark[2])] = (f"{name}.py", line, around(text, line), mark[1])
    return found


def equations():
    """Where each equation of the paper is computed."""
    rows = []
    for number, (file, line, name, _) in sorted(marked().items()):
        where = f"[{file}, line {line}]({file}#L{line}), `{name}`"
        rows.append([f"Eq. {number}, {EQUATIONS[number - 1]}", where])
    return ["paper", "here"], rows


# ----------------------------------------------------------------------------------- arithmetic


def flop_table(shape="mistral-7b"):
    """Table 2's accounting, computed and not measured."""
    printed = (72.51, 158.22, 369.22, 949.54, 2743.46, 8864.49)
    rows = []
    for i, paper in enumerate(printed):
        row = flops_row(SHAPES[shape], Schedule(), 4096 * 2 ** i)
        full, sdtp = row["exact"]
        cache, pruned_cache = row["kv_bytes"]
        rows.append([
            f"{4 * 2 ** i}K", f"{full / 1e12:.2f}", f"{sdtp / 1e12:.2f}",
            f"{1 - sdtp / full:.1%}", f"{full / sdtp:.2f}x",
            f"{row['paper'][0] / 1e12:.2f}", paper,
            f"{cache / 1e9:.2f} -> {pruned_cache / 1e9:.2f} GB",
        ])
    return ["N", "exact, full", "exact, SDTP", "saved", "ideal speed-up",
            "the paper's accounting, full", "the paper prints", "KV cache, full -> SDTP"], rows


def plan_table():
    """A 70B shape on eight devices, by arithmetic: what `python -m lab.plan` prints."""
    rows = []
    for n in (8192, 32768, 131072):
        found = plan(SHAPES["llama-3-70b"], n, Schedule.scaled(80), 8, 6e14, 3e12, 3.5e11)
        gain = found["speedup"]
        gains = (f"{gain['prefill']:.2f}x ({gain['compute']:.2f}x, {gain['traffic']:.2f}x); "
                 f"{gain['decode']:.2f}x")
        for arm, title in (("full", "full"), ("sdtp", "**SDTP**")):
            times = found[arm]
            rows.append([
                f"{n // 1024}K", title,
                f"{found['weights_bytes'] / 1e9:.1f} GB", f"{times['kv_bytes'] / 1e9:.2f} GB",
                f"{found['activation_bytes'] / 1e9:.1f} GB",
                f"{times['compute_s']:.2f} s", f"{times['traffic_s']:.2f} s",
                f"{times['prefill_s']:.2f} s", f"{1e3 * times['decode_s']:.1f} ms",
                gains if arm == "sdtp" else "",
            ])
    return ["N", "arm", "weights", "KV", "activations", "arithmetic", "traffic", "prefill",
            "decode, per token", "prefill speed-up (arithmetic, traffic); decode"], rows


# ------------------------------------------------------------------------------ quality, by scorer


def toy(found):
    """Exact answers of the toy under every scorer, best first."""
    rows = sorted(found["rows"], key=lambda row: -row["value"])
    head = ["kept by", f"exact answers, {rows[0]['n']} fresh prompts of 400 to 434 tokens",
            "asked facts' tokens alive at the end"]
    return head, [[NAMES[row["scorer"]], f"{row['value']:.1%} ± {row['stderr']:.1%}",
                   f"{row['fact_tokens_kept']:.0%}"] for row in rows]


def every_scorer(found, only=()):
    """NLL per token of the scorers in `only`, or of all, best first.

    Where it was measured, a column says how far the predictors are ahead, paired by row.
    """
    rows = [row for row in found["rows"] if row["scorer"] in only or not only]
    rows.sort(key=lambda row: row["value"])
    head = ["kept by", f"NLL per token ({rows[0]['n']} rows)", "tokens kept, mean over blocks",
            "share of the random-to-full gap"]
    cells = [[called(row["scorer"]), likelihood(row), f"{row['mean_keep']:.0%}", share(row)]
             for row in rows]
    if any("predictor_ahead" in row for row in rows):
        head.append("trained predictors ahead by (paired)")
        for line, row in zip(cells, rows):
            line.append(ahead(row))
    return head, cells


def shares(*found, titles=(), only=()):
    """Where scorers, those in `only` or all, stand on several sets of rows; the first orders them.
    """
    by = [{row["scorer"]: row for row in one["rows"] if row["metric"] == "nll"} for one in found]
    names = dict.fromkeys(name for one in by for name in one)
    scorers = [name for name in names
               if name not in ("full", "random") and (name in only or not only)]
    scorers.sort(key=lambda name: -by[0][name]["share_of_gap"] if name in by[0] else 0)
    rows = [[called(name), *(share(one[name]).replace(" ", "") if name in one else ""
                            for one in by)]
            for name in scorers]
    for name in ("random", "full"):
        nll = [f"{one[name]['value']:.2f}" for one in by]
        rows.append([f"*NLL per token: {called(name)}*", *nll])
    columns = [f"{title} ({one['full']['n']} rows)" for title, one in zip(titles, by)]
    return ["kept by", *columns], rows


def peers(found):
    """kvpress' presses beside our arms at the same bytes, likeliest first."""
    costs = {row["scorer"]: row for row in found["costs"]}
    rows = sorted(found["rows"], key=lambda row: row["value"])
    head = ["kept by", f"NLL per token ({rows[0]['n']} rows)", "share of the random-to-full gap",
            "trained predictors ahead by (paired)", "KV cache, MB", "prefill, s"]
    cells = []
    for row in rows:
        name, cost = row["scorer"], costs[row["scorer"]]
        title = called(name) if name.islower() else f"kvpress, {name}"
        cells.append([title, likelihood(row), share(row), ahead(row),
                      f"{cost['kv_bytes'] / 1e6:.1f}", f"{cost['prefill_s']:.2f}"])
    return head, cells


def seeds(*found):
    """The same predictors from other seeds, on the same rows; the last line is their mean."""
    names = ("predictor", "neighbours")
    by = [{row["scorer"]: row for row in one["rows"]} for one in found]
    rows = [[seed, *(share(one[name]) for name in names)] for seed, one in enumerate(by)]
    ends = []
    for name in names:
        won = [one[name]["share_of_gap"] for one in by]
        ends.append(f"{statistics.mean(won):.0%}, standard deviation {statistics.stdev(won):.0%}")
    return ["seed", *(called(name) for name in names)], [*rows, ["mean", *ends]]


def answers(*found, titles=(), only=()):
    """Where scorers, those in `only`, stand on rows with short, middling and long answers."""
    groups = [(title, group) for title, one in zip(titles, found) for group in one["by_answer"]]
    by = [{row["scorer"]: row for row in group["rows"]} for _, group in groups]
    rows = []
    for name in only:
        cells = [share(one[name]).replace(" ", "") if name in one else "" for one in by]
        rows.append([called(name), *cells])
    for name in ("random", "full"):
        nll = [f"{one[name]['value']:.2f}" for one in by]
        rows.append([f"*NLL per token: {called(name)}*", *nll])
    heads = [f"{title}, {answer_range(group)} ({group['n']} rows)" for title, group in groups]
    return ["kept by", *heads], rows


SHORT = ("oracle:norm_gx", "truncate", "earliest@cut", "predictor", "earliest", "norm", "expected")

TASKS = {"copa": "COPA", "piqa": "PIQA", "winogrande": "WinoGrande", "boolq": "BoolQ",
         "lambada_openai": "LAMBADA"}


def by_metric(found):
    return {(row["scorer"], row["metric"]): row for row in found["rows"]}


def by_task(found):
    """The rows of lab.harness -> {task: {(scorer, metric): row}}."""
    tasks = {}
    for row in found["rows"]:
        tasks.setdefault(row["task"], {})[row["scorer"], row["metric"]] = row
    return tasks


def mean(tasks, scorer, value, error):
    """Mean accuracy over tasks with its standard error: their rows differ, so are independent."""
    rows = [by[scorer, "acc"] for by in tasks]
    total = sum(row[value] for row in rows)
    squares = sum(row[error] ** 2 for row in rows)
    return points(total / len(rows), squares ** 0.5 / len(rows))


def accuracies(title, by, scorers, metrics=("acc",)):
    """A row of accuracies in percent; where there are two metrics, one / the other."""
    row = [f"{title} ({by['full', 'acc']['n']} rows)"]
    for scorer in scorers:
        row.append(" / ".join(f"{100 * by[scorer, metric]['value']:.0f}" for metric in metrics))
    return row


def choice(*found):
    """Table 3, a task in each row: accuracy, where there are two, also by likelihood per character.

    The means are those of the multiple-choice tasks, without LAMBADA.
    """
    rows = []
    for one in found:
        tasks, shots = by_task(one), one["num_fewshot"] or 0
        scorers = list(dict.fromkeys(row["scorer"] for row in one["rows"]))     # the first is full
        for task, by in tasks.items():
            metrics = [name for name in ("acc", "acc_norm") if ("full", name) in by]
            rows.append(accuracies(f"{TASKS[task]}, {shots}-shot", by, scorers, metrics))
        chosen = [by for task, by in tasks.items() if task != "lambada_openai"]
        means = [mean(chosen, scorer, "value", "stderr") for scorer in scorers]
        paired = [mean(chosen, scorer, "vs_full", "vs_full_stderr") for scorer in scorers[1:]]
        rows += [[f"{shots}-shot mean", *means], ["against full (paired)", "", *paired]]
    return ["accuracy, %", *(NAMES[scorer] for scorer in scorers)], rows


LONG = {"smollm2_multi_news": "multi_news, summaries", "smollm2_qmsum": "QMSum, meetings",
        "smollm2_dolly_f1": "Dolly, questions", "smollm2_passages_f1": "4 passages, questions"}


def long_prompts(*found):
    """Table 1's columns; a set's name stands in the first of its rows."""
    rows = []
    for title, one in zip(LONG.values(), found):
        by = by_metric(one)
        metric, unit = ("f1", "F1") if ("full", "f1") in by else ("rouge_l", "ROUGE-L")
        n, tokens = by["full", metric]["n"], one["prompt_tokens"][1]
        name = f"{title} ({n} rows, {tokens:.0f} tokens)"
        for scorer in dict.fromkeys(row["scorer"] for row in one["rows"]):
            score, nll = by[scorer, metric], by[scorer, "nll"]
            rows.append([
                name, called(scorer), f"{1 / score['mean_keep']:.2f}x",
                f"{unit} {points(score['value'], score['stderr'])}", likelihood(nll), share(nll),
                f"{by[scorer, 'prefill_speedup']['value']:.2f}x",
                f"{by[scorer, 'e2e_speedup']['value']:.2f}x",
            ])
            name = ""
    return ["rows", "kept by", "compression", "answer", "NLL of the reference",
            "share of the gap", "prefill", "end to end"], rows


def h2o(tasks, dolly):
    """Table 6."""
    tasks, dolly = by_task(tasks), by_metric(dolly)
    copa, piqa = tasks["copa"], tasks["piqa"]
    rows = []
    for arm in ("full", "full+h2o", "predictor", "predictor+h2o", "full+local"):
        accuracy = [points(by[arm, "acc"]["value"], by[arm, "acc"]["stderr"])
                    for by in (copa, piqa)]
        nll = dolly[arm, "nll"]
        against = "" if arm == "full" else plus(nll["vs_full"], nll["vs_full_stderr"])
        rows.append([NAMES[arm], *accuracy, likelihood(nll), against])
    return ["", f"COPA, 5-shot accuracy ({copa['full', 'acc']['n']} rows)",
            f"PIQA, 5-shot accuracy ({piqa['full', 'acc']['n']} rows)",
            f"Dolly, NLL ({dolly['full', 'nll']['n']} rows)", "NLL against full (paired)"], rows


# ------------------------------------------------------------------------------------------- speed

ARMS = {"full": "full", "sdtp": "**SDTP**"}


def speed_short(found):
    """What pruning gives at each prompt length."""
    rows = []
    for row in found["bench"]:
        full, sdtp, gain = row["full"], row["sdtp"], row["speedup"]
        rows.append([
            row["n"],
            f"{full['prefill_s']:.2f} -> {sdtp['prefill_s']:.2f} = {gain['prefill']:.2f}x",
            f"{row['share_of_ideal']:.0%} of {row['ideal']:.2f}x",
            f"{1e3 * full['decode_s']:.1f} -> {1e3 * sdtp['decode_s']:.1f}",
            f"{full['e2e_s']:.2f} -> {sdtp['e2e_s']:.2f} = {gain['e2e']:.2f}x",
        ])
    return ["N", "prefill, s, full -> SDTP", "of its ideal", "decode, ms a token",
            "end to end, s"], rows


def speed_arms(found):
    """Table 2, measured: a row for each prompt length and arm."""
    rows, first = [], found["bench"][0]
    for row in found["bench"]:
        for name in ("full", "sdtp"):
            arm = row[name]
            low, high = arm["prefill_spread_s"]
            rows.append([
                row["n"], ARMS[name], f"{arm['prefill_s']:.2f} s ({low:.2f} to {high:.2f})",
                f"{arm['flops_s'] / 1e9:.0f} GFLOP/s = {arm['of_peak']:.0%}",
                f"{1e3 * arm['decode_s']:.1f} ms",
                f"{arm['bytes_s'] / 1e9:.1f} GB/s = {arm['of_read']:.0%}",
                f"{arm['e2e_s']:.2f} s", f"{arm['kv_bytes'] / 1e6:.0f} MB",
            ])
    return ["N", "arm", "prefill", f"of the matmul peak, {first['peak_flops'] / 1e9:.0f} GFLOP/s",
            "decode, per token",
            f"of a large matrix-vector product's {first['read_bytes_s'] / 1e9:.1f} GB/s",
            "end to end", "KV"], rows


def speed_memory(found):
    """Each arm's peak of memory beside what it has to hold, GB."""
    rows = []
    for row in found["bench"]:
        for name in ("full", "sdtp"):
            parts = row[name]["must_hold_bytes"]
            sizes = [row[name]["peak_bytes"], sum(parts.values()), *parts.values()]
            rows.append([row["n"], ARMS[name], *[f"{size / 1e9:.2f}" for size in sizes]])
    return ["N", "arm", "peak, GB", "must hold", "weights", "libraries", "caches",
            "a state for each token", "SwiGLU's inner values"], rows


def speed_ratios(found):
    """Table 2, measured: what pruning gives."""
    rows = []
    for row in found["bench"]:
        gain = row["speedup"]
        rows.append([
            row["n"], row["repeats"],
            f"{gain['prefill']:.2f}x of {row['ideal']:.2f}x = {row['share_of_ideal']:.0%}",
            f"{gain['e2e']:.2f}x ({gain['e2e_by_floors']:.2f}x)", f"{row['pruning_share']:.1%}",
        ])
    return ["N", "times", "SDTP, prefill speed-up of its ideal", "end to end (by the floors)",
            "stages' share of its prefill"], rows


def faster(before, after, unit, scale=1):
    return f"{scale * before:.2f} -> {scale * after:.2f} {unit} = {before / after:.2f}x"


def speed_vs(*found):
    """transformers beside the unpruned arm."""
    rows = []
    for each in found:
        for row in each["bench"]:
            full, other = row["full"], row["transformers"]
            rows.append([
                each["ckpt"], row["n"], faster(other["prefill_s"], full["prefill_s"], "s"),
                faster(other["decode_s"], full["decode_s"], "ms", 1e3),
                f"{row['vs']['logits_differ_by']:.0e}",
            ])
    return ["model", "N", "prefill, transformers -> ours", "decode, transformers -> ours",
            "first logits differ by"], rows


def speed_compiled(*found):
    """Pairs of results, without and with torch.compile."""
    rows = []
    for plain, compiled in zip(found[::2], found[1::2]):
        for before, after in zip(plain["bench"], compiled["bench"], strict=True):
            for name in ("full", "sdtp"):
                a, b = before[name], after[name]
                rows.append([plain["ckpt"], before["n"], ARMS[name],
                             faster(a["prefill_s"], b["prefill_s"], "s"),
                             faster(a["decode_s"], b["decode_s"], "ms", 1e3), compiled["graphs"]])
    return ["model", "N", "arm", "prefill, plain -> compiled", "decode, plain -> compiled",
            "graphs"], rows


# --------------------------------------------------------------------------------------- ablations


def variant(row):
    won = share(row)
    if "trials" in row:             # one for each seed
        won += f" ({', '.join(f'{trial:.0%}' for trial in row['trials'])})"
    return [row["scorer"], likelihood(row), f"{row['mean_keep']:.0%}", won]


def variants(found, group=None):
    """A table of lab/ablations.py, against its first variant; or one of its groups.

    Full and random are the ends of the share. A group tells neither, the whole table random.
    """
    rows = [row for row in found["rows"] if row["scorer"] != "full"]
    head = ["variant", f"NLL per token ({rows[0]['n']} rows)", "tokens kept", "share of the gap"]
    if group:
        rows = [row for row in rows if row["group"].startswith(group)]
        return head, [variant(row) for row in rows if row["scorer"] != "random"]
    against = []
    for row in rows:
        error = row.get("vs_first_stderr", 0)       # the first is paired with itself
        gain = f"{100 * row['vs_first']:+.0f} ± {100 * error:.0f} points" if error else ""
        against.append(gain)
    if not any(against):            # one variant alone
        return head, [variant(row) for row in rows]
    return ([*head, "against the first variant (paired)"],
            [[*variant(row), gain] for row, gain in zip(rows, against)])


def gradients(toy, smollm2):
    """Results of lab/gradient.py, a checkpoint after the other."""
    head = ["gradient at a dropped token", "rank correlation with the change", "cosine",
            "size beside the change"]
    names = {"ours": "what seeing its key would change", "derivative": "the derivative at 0"}
    rows = []
    for where, found in (("toy", toy), ("SmolLM2", smollm2)):
        for row in found["rows"]:
            title = f"{where}, {row['n']} rows: {names[row['gradient']]}"
            rows.append([title, f"{row['spearman']:.2f}", f"{row['cosine']:.2f}",
                         f"{row['size']:.2g} times"])
    return head, rows


def keep_ratios(found):
    """Every scorer at several keep ratios: its share of the gap, likeliest first."""
    by = {(row["scorer"], row["keep"]): row for row in found["rows"]}
    keeps = sorted({keep for _, keep in by}, reverse=True)
    scorers = {scorer for scorer, _ in by} - {"full", "random"}
    likeliest = sorted(scorers, key=lambda name: sum(by[name, keep]["value"] for keep in keeps))
    rows = [[NAMES[name], *(share(by[name, keep]) for keep in keeps)] for name in likeliest]
    for name in ("predictor", "random", "full"):
        title = f"*NLL per token: {NAMES[name].strip('*')}*"
        rows.append([title, *(f"{by[name, keep]['value']:.2f}" for keep in keeps)])
    kept = [f"r = {keep:g}, {by['predictor', keep]['mean_keep']:.0%} kept" for keep in keeps]
    return ["kept by", *kept], rows


# ----------------------------------------------------------------------------------- all together


class Table(NamedTuple):
    make: Callable                  # what the files hold -> head, rows
    files: tuple = ()               # names in results/


def group(name, file="smollm2_open"):
    return Table(partial(variants, group=name), (file,))


TABLES = {
    "equations": Table(equations),
    "flops": Table(flop_table),
    "plan": Table(plan_table),
    "toy": Table(toy, ("toy_exact",)),
    "quality": Table(partial(shares, titles=("Dolly", "4 passages", "LAMBADA"), only=SHORT),
                     ("smollm2_rules", "smollm2_passages", "smollm2_lambada_rules")),
    "nll": Table(every_scorer, ("smollm2_nll",)),
    "text": Table(every_scorer, ("smollm2_text",)),
    "passages": Table(every_scorer, ("smollm2_passages",)),
    "passages_more": Table(partial(shares, titles=("4 passages", "8 passages", "question last")),
                           ("smollm2_passages", "smollm2_passages_8", "smollm2_passages_last")),
    "answers": Table(partial(answers, titles=("135M", "0.5B"),
                             only=("oracle:norm_gx", "truncate", "predictor", "neighbours",
                                   "earliest@cut", "recent@cut", "norm")),
                     ("smollm2_passages", "qwen05_passages")),
    "passages_seeds": Table(seeds, ("smollm2_passages", "smollm2_passages_seed1",
                                    "smollm2_passages_seed2")),
    "peers": Table(peers, ("smollm2_peers",)),
    "rules": Table(partial(shares, titles=("Dolly", "plain text", "LAMBADA")),
                   ("smollm2_rules", "smollm2_text_rules", "smollm2_lambada_rules")),
    "larger": Table(partial(shares, titles=("Dolly, 0.5B", "Dolly, 135M", "passages, 1.5B",
                                            "passages, 0.5B", "passages, 135M"),
                            only=(*SHORT, "predictor@cut", "oracle:norm_gx@cut")),
                    ("qwen05_dolly", "smollm2_rules", "qwen15_passages", "qwen05_passages",
                     "smollm2_passages")),
    "choice": Table(choice, ("smollm2_harness_0", "smollm2_harness_5")),
    "long": Table(long_prompts, tuple(LONG)),
    "h2o": Table(h2o, ("smollm2_harness_h2o", "smollm2_h2o_nll")),
    "speed": Table(speed_short, ("qwen05_speed_cpu",)),
    "speed_arms": Table(speed_arms, ("qwen05_speed_cpu",)),
    "speed_ratios": Table(speed_ratios, ("qwen05_speed_cpu",)),
    "speed_memory": Table(speed_memory, ("qwen05_speed_cpu",)),
    "speed_vs": Table(speed_vs, ("qwen05_transformers_cpu", "smollm2_speed_cpu")),
    "speed_small": Table(speed_ratios, ("smollm2_speed_cpu",)),
    "speed_compiled": Table(speed_compiled, ("smollm2_eager_cpu", "smollm2_compiled_cpu",
                                             "qwen05_eager_cpu", "qwen05_compiled_cpu")),
    "losses": Table(variants, ("smollm2_losses",)),
    "seeds": Table(variants, ("smollm2_seeds",)),
    "gradient": Table(gradients, ("toy_gradient", "smollm2_gradient")),
    "targets": Table(variants, ("smollm2_targets",)),
    "keep": Table(keep_ratios, ("smollm2_tradeoff",)),
    "open": group("keep ratio"),
    "allocation": group("allocation"),
    "question": group("question"),
    "data": group("training data"),
    "figures": group("figure", "smollm2_figures"),
}


def render(text, page="README.md"):
    """A page with every table made anew; a marker without a table gets its table."""
    up = "../" * (len(Path(page).parts) - 1)

    def table(match):
        name = match[1]
        need(name in TABLES, f"{page}: unknown table {name!r}; there are {', '.join(TABLES)}")
        make, files = TABLES[name]
        found = [result(file) for file in files]
        parts = [markdown(*make(*found))]
        if files:
            parts.append(source(files, found, up))
        return f"<!-- table {name} -->\n" + "\n\n".join(parts) + "\n<!-- end -->"

    old_table = r"\n(?:(?!<!-- table ).)*?<!-- end -->"
    return re.sub(rf"<!-- table (\w+) -->(?:{old_table})?", table, text, flags=re.S)


def figures():
    """Draw the pictures that come from results/ alone."""
    curve(result("smollm2_training")["log"], ROOT / "results" / "smollm2_training.png")
    rows = result("smollm2_tradeoff")["rows"]
    full = next(row for row in rows if row["scorer"] == "full")
    lines = {}
    for row in rows:
        if row["scorer"] != "full":
            lines.setdefault(NAMES[row["scorer"]].strip("*"), []).append(row)
    best_first = sorted(lines, key=lambda name: sum(row["value"] for row in lines[name]))
    title = f"SmolLM2-135M-Instruct, {full['n']} held-out rows"
    tradeoff({name: lines[name] for name in best_first}, full,
             ROOT / "results" / "smollm2_keep.png", title)
    for name in ("qwen05_speed_cpu", "smollm2_cost_cpu"):
        found = result(name)
        title = f"{found['ckpt']}, {found['hardware']}, {found['dtype']}"
        cost_against_length(found["bench"], ROOT / "results" / f"{name}.png", title)


def main():
    parser = command_parser(__doc__)
    parser.add_argument("--figures", action="store_true", help="draw results/smollm2_training.png "
                        "and results/smollm2_keep.png from the JSON beside them")
    parser.add_argument("--check", action="store_true",
                        help="write nothing; fail if a table has drifted")
    args = parser.parse_args()
    if args.figures:
        figures()
    for page in PAGES:
        path = ROOT / page
        old = path.read_text(encoding="utf-8")
        new = render(old, page)
        if args.check:
            wanted = "a table is not what results/ says; run python -m lab.tables"
            need(new == old, f"{page}: {wanted}")
        elif new != old:
            path.write_text(new, encoding="utf-8")
            print(f"{page}: tables written anew")


if __name__ == "__main__":
    cli(main)
