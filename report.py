"""The README's tables, written from the files in results/, so that they cannot drift from what was measured.

A table stands in README.md between `<!-- table NAME -->` and `<!-- end -->`; everything between is replaced.

    python report.py            # write the tables into README.md
    python report.py --figures  # draw the training curve, and quality against tokens kept, from results/ (needs matplotlib)
    python report.py --check    # exit 1 if a table there is not what results/ says
"""
import argparse
import ast
import json
import re
from pathlib import Path

from common import cli
from model import SHAPES, need
from parallel import plan
from pictures import curve, tradeoff
from prune import Schedule, flops, kv_bytes

ROOT = Path(__file__).resolve().parent
NAMES = {"full": "full model", "predictor": "**trained predictors**", "prior": "trained predictors + position prior", "random": "random", "recent": "latest tokens",
         "earliest": "first tokens", "norm": "largest hidden state", "attention": "attention received, all queries", "attention16": "attention received, last 16 queries",
         "oracle:norm_gx": "gradient oracle, norm of g * x (needs the answer: a ceiling)", "oracle:norm_g": "gradient oracle, norm of g", "oracle:abs_dot": "gradient oracle, abs(g . x), the literal Eq. 3",
         "predictor@5": "trained predictors, 5 stages (SDTP-low)", "compress": "prompt compression by the same scores", "full+h2o": "H2O at 40%", "full+local": "latest 40% only",
         "predictor+h2o": "trained predictors + H2O at 40%"}
TASKS = {"copa": "COPA", "piqa": "PIQA", "winogrande": "WinoGrande", "boolq": "BoolQ"}


def result(name):
    path = ROOT / "results" / f"{name}.json"
    need(path.is_file(), f"{path}: not measured yet; see results/make.sh")
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(head, rows):
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in (head, ["---"] * len(head), *rows))


def source(*names):
    """What stands under a table: command, rows, commit and hardware."""
    first = result(names[0])
    commits, hardware, dtypes = (", ".join(dict.fromkeys(str(result(n)[key]) for n in names)) for key in ("commit", "hardware", "dtype"))
    seconds = sum(result(name).get("seconds") or 0 for name in names)
    spent = f"{seconds / 60:.0f} min on " if seconds > 90 else f"{seconds:.0f} s on " if seconds else ""
    return (f"\n\n`{first['command']}`" + (" and the like" if len(names) > 1 else "")
            + f" ({', '.join(f'[{name}.json](results/{name}.json)' for name in names)}; {spent}{hardware}, {dtypes}; commit {commits})")


def plus(value, error, digits=3):
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def percent(value, error):
    return f"{value:.0%} ± {error:.0%}"


def toy():
    """Exact answers of the toy under every scorer, best first."""
    rows = sorted(result("toy_exact")["rows"], key=lambda r: -r["value"])
    return markdown(["kept by", f"exact answers, {rows[0]['n']} fresh prompts of 400 to 434 tokens", "asked facts' tokens alive at the end"],
                    [[NAMES[r["scorer"]], f"{r['value']:.1%} ± {r['stderr']:.1%}", f"{r['fact_tokens_kept']:.0%}"] for r in rows]) + source("toy_exact")


def flop_table(shape="mistral-7b"):
    """Table 2's accounting, computed and not measured."""
    config, schedule, rows = SHAPES[shape], Schedule(), []
    L = config.n_blocks
    for n, printed in zip((4096 * 2 ** i for i in range(6)), (72.51, 158.22, 369.22, 949.54, 2743.46, 8864.49)):
        counts = schedule.counts(n, L)
        full, sdtp = flops(config, [n] * L), flops(config, counts, schedule=schedule)
        rows.append([f"{n // 1024}K", f"{full / 1e12:.2f}", f"{sdtp / 1e12:.2f}", f"{1 - sdtp / full:.1%}", f"{full / sdtp:.2f}x", f"{flops(config, [n] * L, 'paper') / 1e12:.2f}", printed,
                     f"{kv_bytes(config, [n] * L) / 1e9:.2f} -> {kv_bytes(config, counts) / 1e9:.2f} GB"])
    return markdown(["N", "exact, full", "exact, SDTP", "saved", "ideal speed-up", "the paper's accounting, full", "the paper prints", "KV cache, full -> SDTP"], rows)


def likelihood(name):
    """NLL per token of every scorer, best first."""
    rows = sorted(result(name)["rows"], key=lambda r: r["value"])
    return markdown(["kept by", f"NLL per token ({rows[0]['n']} rows)", "tokens kept, mean over blocks", "share of the random-to-full gap"],
                    [[NAMES.get(r["scorer"], r["scorer"]), plus(r["value"], r["stderr"]), f"{r['mean_keep']:.0%}",
                      percent(r["share_of_gap"], r["share_stderr"]) if "share_of_gap" in r else {"full": "100%", "random": "0%"}.get(r["scorer"], "")] for r in rows]) + source(name)


def choice():
    """Table 3's layout: accuracy in percent, for COPA and PIQA also per byte; means of the raw ones over tasks with their standard errors."""
    files = [name for shots in (0, 5) for task in TASKS if (ROOT / "results" / f"{(name := f'smollm2_{task}_{shots}')}.json").is_file()]
    cells = {(name, r["scorer"], r["metric"]): r for name in files for r in result(name)["rows"]}
    last = {r["scorer"]: r for r in result("smollm2_lambada")["rows"] if r["metric"] == "acc"}
    means = {shots: [name for name in files if name.endswith(str(shots))] for shots in (0, 5)}   # different tasks: different rows, independent
    scorers, rows = list(dict.fromkeys(r["scorer"] for r in result(files[0])["rows"])), []
    for scorer in scorers:
        row = [NAMES[scorer]]
        row += [" / ".join(f"{100 * cells[name, scorer, m]['value']:.0f}" for m in ("acc", "acc_norm")[:2 if "piqa" in name or "copa" in name else 1]) for name in files] + [f"{100 * last[scorer]['value']:.0f}"]
        for shots in (0, 5):
            these = [cells[name, scorer, "acc"] for name in means[shots]]
            row.append(plus(100 * sum(r["value"] for r in these) / len(these), 100 * sum(r["stderr"] ** 2 for r in these) ** 0.5 / len(these), 1))
            row.append("" if scorer == "full" else plus(100 * sum(r["vs_full"] for r in these) / len(these), 100 * sum(r["vs_full_stderr"] ** 2 for r in these) ** 0.5 / len(these), 1))
        rows.append(row)
    n = [cells[name, "full", "acc"]["n"] for name in files]
    head = ["kept by"] + [f"{TASKS[name.split('_')[1]]}, {name[-1]}-shot ({k} rows)" for name, k in zip(files, n)] + [f"LAMBADA ({last['full']['n']} rows)", "0-shot mean", "against full (paired)", "5-shot mean", "against full (paired)"]
    return markdown(head, rows) + source(*files, "smollm2_lambada")


def long_prompts():
    """Table 1's columns."""
    rows, names = [], {"multi_news": "multi_news, summaries", "qmsum": "QMSum, meetings", "dolly_f1": "Dolly, questions"}
    for name, title in names.items():
        found = result(f"smollm2_{name}")
        by = {(r["scorer"], r["metric"]): r for r in found["rows"]}
        metric = "rouge_l" if ("full", "rouge_l") in by else "f1"
        for scorer in dict.fromkeys(r["scorer"] for r in found["rows"]):
            score, nll = by[scorer, metric], by[scorer, "nll"]
            rows.append([f"{title} ({score['n']} rows, {found['prompt_tokens'][1]:.0f} tokens)", NAMES[scorer], f"{1 / score['mean_keep']:.2f}x",
                         f"{ {'rouge_l': 'ROUGE-L', 'f1': 'F1'}[metric] } " + plus(100 * score["value"], 100 * score["stderr"], 1), plus(nll["value"], nll["stderr"]),
                         percent(nll["share_of_gap"], nll["share_stderr"]) if "share_of_gap" in nll else {"full": "100%", "random": "0%"}.get(scorer, ""),
                         *(f"{by[scorer, part + '_speedup']['value']:.2f}x" for part in ("prefill", "e2e"))])
    return markdown(["rows", "kept by", "compression", "answer", "NLL of the reference", "share of the random-to-full gap", "prefill", "end to end, 64 new tokens"], rows) + source(*(f"smollm2_{n}" for n in names))


def h2o():
    """Table 6."""
    files = {task: name for task in ("COPA", "PIQA", "Dolly") if (ROOT / "results" / f"{(name := 'smollm2_h2o_' + {'Dolly': 'nll'}.get(task, task.lower()))}.json").is_file()}
    accuracy = [task for task in files if task != "Dolly"]
    by = {(task, r["scorer"]): r for task, name in files.items() for r in result(name)["rows"] if r["metric"] in ("acc", "nll")}
    rows = [[NAMES[s], *(plus(100 * by[t, s]["value"], 100 * by[t, s]["stderr"], 1) for t in accuracy), plus(by["Dolly", s]["value"], by["Dolly", s]["stderr"]),
             plus(by["Dolly", s]["vs_full"], by["Dolly", s]["vs_full_stderr"]) if s != "full" else ""] for s in ("full", "full+h2o", "predictor", "predictor+h2o", "full+local")]
    head = ["", *(f"{t}, 5-shot accuracy ({by[t, 'full']['n']} rows)" for t in accuracy), f"Dolly, NLL ({by['Dolly', 'full']['n']} rows)", "NLL against full (paired)"]
    return markdown(head, rows) + source(*files.values())


def speed(name):
    """Table 2, measured: a row per prompt length and arm."""
    found, rows = result(name), []
    for r in found["bench"]:
        for arm, title in (("transformers", "transformers, full"), ("full", "full"), ("sdtp", "**SDTP**")):
            if arm not in r:
                continue
            a = r[arm]
            cells = [r["n"], title, f"{a['prefill_s']:.3f} s", f"{a['flops_s'] / 1e9:.0f} GFLOP/s = {a['of_peak']:.0%}", f"{1e3 * a['decode_s']:.1f} ms", f"{a['bytes_s'] / 1e9:.1f} GB/s = {a['of_copy']:.0%}",
                     f"{a['e2e_s']:.2f} s", f"{(a['peak_bytes'] or 0) / 1e9:.2f} GB", f"{a['kv_bytes'] / 1e6:.0f} MB"]
            if arm == "sdtp":
                s = r["speedup"]
                cells += [f"{s['prefill']:.2f}x of {r['ideal']:.2f}x = {r['share_of_ideal']:.0%}", f"{s['e2e']:.2f}x ({s['e2e_by_floors']:.2f}x)", f"{r['pruning_share']:.1%}"]
            else:
                cells += ["" if arm == "full" or "vs" not in r else f"full is {r['vs']['prefill']:.2f}x as fast", "" if arm == "full" else f"decode {r['vs']['decode']:.2f}x", ""]
            rows.append(cells)
    first = found["bench"][0]
    head = ["N", "arm", "prefill", f"of the matmul peak, {first['peak_flops'] / 1e9:.0f} GFLOP/s", "decode, per token", f"of the copy bandwidth, {first['copy_bytes_s'] / 1e9:.1f} GB/s", "end to end", "peak memory", "KV",
            "prefill speed-up of its ideal", "end to end (by the floors)", "stages' share of prefill"]
    return markdown(head, rows) + source(name)


def study(name):
    """A table of study.py, or one of its groups (NAME/GROUP)."""
    name, _, group = name.partition("/")
    found = [r for r in result(name)["rows"] if not group or r["group"].startswith(group)]
    first = next((r for r in found if "share_of_gap" in r), None)
    rows = []
    for r in found:
        if "share_of_gap" not in r and (group or r["scorer"] == "full") and r["scorer"] in ("full", "random"):
            continue                # full and random are the ends of the share
        rows.append([r["scorer"], plus(r["value"], r["stderr"]), f"{r['mean_keep']:.0%}", percent(r["share_of_gap"], r["share_stderr"]) if "share_of_gap" in r else "0%"]
                    + ([] if group else ["" if r is first or "vs_first" not in r else f"{100 * r['vs_first']:+.0f} ± {100 * r['vs_first_stderr']:.0f} points"]))
    return markdown(["variant", f"NLL per token ({found[0]['n']} rows)", "tokens kept", "share of gap"] + ([] if group else ["against the first row (paired)"]), rows) + source(name)


def plan_table():
    """A 70B shape on eight devices, by arithmetic: what `python parallel.py` prints."""
    rows = []
    for n in (8192, 32768, 131072):
        found = plan(SHAPES["llama-3-70b"], n, Schedule.scaled(80), 8, 6e14, 3e12, 3.5e11)
        for arm, title in (("full", "full"), ("sdtp", "**SDTP**")):
            r, s = found[arm], found["speedup"]
            rows.append([f"{n // 1024}K", title, f"{found['weights_bytes'] / 1e9:.1f} GB", f"{r['kv_bytes'] / 1e9:.2f} GB", f"{found['activation_bytes'] / 1e9:.1f} GB", f"{r['compute_s']:.2f} s", f"{r['traffic_s']:.2f} s", f"{r['prefill_s']:.2f} s",
                         f"{1e3 * r['decode_s']:.1f} ms", f"{s['prefill']:.2f}x ({s['compute']:.2f}x, {s['traffic']:.2f}x); {s['decode']:.2f}x" if arm == "sdtp" else ""])
    return markdown(["N", "arm", "weights", "KV", "activations", "arithmetic", "traffic", "prefill", "decode, per token", "prefill speed-up (arithmetic, traffic); decode"], rows)


EQUATIONS = ("the module: keep and drop logits of a hidden state", "Gumbel-Softmax mask", "saliency, read literally (the default takes a norm instead)", "MSE between score and saliency",
             "the ranking loss of all stages", "the ranking loss of one stage", "cross entropy of the pruned model", "the whole training loss")


def equations():
    """Where each equation is computed: the line marked with its number, and the function around it."""
    rows = []
    for number, what in enumerate(EQUATIONS, start=1):
        for path in [ROOT / f"{name}.py" for name in ("model", "saliency", "predictor", "prune", "train", "infer")]:
            text = path.read_text(encoding="utf-8")
            for line, code in enumerate(text.splitlines(), start=1):
                if code.endswith(f"# Eq. {number}"):
                    names = [node.name for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.lineno <= line <= node.end_lineno]
                    rows.append([f"Eq. {number}", what, f"[{path.name}, line {line}]({path.name}#L{line}), `{'.'.join(names)}`", f"`{code.rsplit('#', 1)[0].strip()}`"])
    return markdown(["paper", "what", "where", "the line"], rows)


def keep_ratios():
    """Every scorer at several keep ratios: the share of the random-to-full gap, likeliest first."""
    found = [r for r in result("smollm2_tradeoff")["rows"] if r["group"] == "keep ratio"]
    keeps, by = sorted({r["keep"] for r in found}, reverse=True), {(r["scorer"], r["keep"]): r for r in found}
    names = sorted({r["scorer"] for r in found} - {"full", "random"}, key=lambda name: sum(by[name, k]["value"] for k in keeps))
    rows = [[NAMES[name], *(percent(by[name, k]["share_of_gap"], by[name, k]["share_stderr"]) for k in keeps)] for name in names]
    rows.append(["*NLL: the predictors (random, full)*", *(f"{by['predictor', k]['value']:.2f} ({by['random', k]['value']:.2f}, {by['full', k]['value']:.2f})" for k in keeps)])
    head = ["kept by", *(f"keep {k:g}: {by['predictor', k]['mean_keep']:.0%} of the tokens, mean over blocks" for k in keeps)]
    return markdown(head, rows) + source("smollm2_tradeoff")


TABLES = {"equations": equations, "plan": plan_table, "toy": toy, "speed": lambda: speed("smollm2_speed_cpu"), "flops": flop_table, "nll": lambda: likelihood("smollm2_nll"), "text": lambda: likelihood("smollm2_text"), "choice": choice, "long": long_prompts, "h2o": h2o,
          "losses": lambda: study("smollm2_losses"), "targets": lambda: study("smollm2_targets"), "open": lambda: study("smollm2_open/"),
          "keep": keep_ratios, "allocation": lambda: study("smollm2_open/allocation"), "question": lambda: study("smollm2_open/question"),
          "data": lambda: study("smollm2_open/training data"), "figures": lambda: study("smollm2_figures/figure")}


def figures():
    """The pictures that are drawn from results/ alone."""
    curve(result("smollm2_training")["log"], ROOT / "results" / "smollm2_training.png")
    every = (ROOT / "results" / "smollm2_tradeoff.json").is_file()
    found, lines = result("smollm2_tradeoff" if every else "smollm2_open"), {}
    rows = [r for r in found["rows"] if r["group"] == "keep ratio"]
    for r in rows:                  # table open names a row by its keep ratio, and the predictors not at all
        name = r["scorer"] if every else re.sub(r"keep [\d.]+(, )?", "", r["scorer"]) or "predictor"
        lines.setdefault(NAMES.get(name, name).strip("*"), []).append(r)
    full = lines.pop(NAMES["full"])[0]
    lines = dict(sorted(lines.items(), key=lambda line: sum(r["value"] for r in line[1])))       # best first
    trained = "" if every else f", predictors of {found['training_rows']} training rows"
    tradeoff(lines, full, ROOT / "results" / "smollm2_keep.png", f"SmolLM2-135M-Instruct, {full['n']} held-out rows{trained}")


def render(text):
    """The README with every table made anew."""
    def table(match):
        need(match[1] in TABLES, f"README.md: unknown table {match[1]!r}; there are {', '.join(TABLES)}")
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"
    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", table, text, flags=re.S)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", action="store_true", help="draw results/smollm2_training.png and results/smollm2_keep.png from the JSON beside them (needs matplotlib)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table has drifted")
    args = parser.parse_args()
    if args.figures:
        figures()
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = render(old)
    if args.check:
        need(new == old, "README.md: a table is not what results/ says; run python report.py")
    elif new != old:
        readme.write_text(new, encoding="utf-8")
        print("README.md: tables written anew")


if __name__ == "__main__":
    cli(main)
