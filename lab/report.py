"""Every measured table and curve, made from the files in results/, so that none drifts from them.

A table stands in README.md or docs/results.md after `<!-- table NAME -->`; what lies between that
and `<!-- end -->` is replaced. results/tables.toml says what it shows. Nothing is measured here:
results/make.sh does that.

    python -m lab.report                # write the tables
    python -m lab.report --check        # write nothing; fail if a table is not what results/ says
    python -m lab.report --figures      # also draw the curves (needs matplotlib)
"""
import argparse
import ast
import contextlib
import math
import re
import string
import tomllib
from pathlib import Path

from model import Config
from prune import Schedule, flops_row
from support import show
from support.config import SHAPES
from support.files import need, read_json
from support.options import cli
from support.weights import ROOT

PAGES = ("README.md", "docs/results.md")
RESULTS = ROOT / "results"
TABLES = tomllib.loads((RESULTS / "tables.toml").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------ what was measured


def result(name):
    """What results/NAME.json holds; "flops" is computed and not read."""
    if name == "flops":
        return {"rows": flop_rows()}
    found = read_json(RESULTS / f"{name}.json")
    if "num_fewshot" in found:
        found["rows"] += mean_rows(found["rows"])
    return found


def flop_rows():
    """Table 2's FLOPs: the rows of prune.flops_row, with what they allow at best."""
    rows = []
    for n in (4096, 8192, 16384, 32768, 65536, 131072):
        row = flops_row(Config(**SHAPES["mistral-7b"]), Schedule(), n)
        full, sdtp = row["exact"]
        rows.append({**row, "ideal": full / sdtp, "saved": 1 - sdtp / full})
    return rows


def mean_rows(rows):
    """Each scorer's mean accuracy over the multiple-choice tasks of lab/harness.py.

    The tasks read different rows, so their errors are independent.
    """
    means = []
    for scorer in dict.fromkeys(row["scorer"] for row in rows):
        chosen = [row for row in rows if row["scorer"] == scorer and row["metric"] == "acc"
                  and row["task"] != "lambada_openai"]
        mean = {"scorer": scorer, "metric": "acc", "task": "mean"}
        for value, error in (("value", "stderr"), ("vs_full", "vs_full_stderr")):
            if value in chosen[0]:
                mean[value] = sum(row[value] for row in chosen) / len(chosen)
                mean[error] = math.hypot(*(row[error] for row in chosen)) / len(chosen)
        means.append(mean)
    return means


# ------------------------------------------------------------------------------------- tables


class Cells(string.Formatter):
    """str.format with a unit behind a format: "{seconds:.1f/1e-3}" gives milliseconds."""

    def format_field(self, value, spec):
        spec, _, unit = spec.partition("/")
        return format(value / float(unit) if unit else value, spec)


def cell(formats, row):
    """A row's cell: the first of the formats, a|b, whose fields are there, else nothing."""
    for each in TABLES["cells"].get(formats, formats).split("|"):
        with contextlib.suppress(LookupError):
            return Cells().format(each, **row)
    return ""


def lines(columns, only=(), ordered=False, first="kept by"):
    """Head and lines of a table, lists of cells; the arguments are explained in tables.toml."""
    heads, found = [first], []      # found: for each column {name of a line: row}
    for file, head, _, *where in columns:
        where, reads = dict(*where), map(result, file.split("+"))
        rows = [row for read in reads for row in read.get("rows") or read["bench"]
                if where.items() <= row.items()]
        heads.append(head.format(**rows[0]))
        found.append({row.get("scorer") or row["n"]: row for row in rows})
    names = dict.fromkeys(name for rows in found for name in rows)
    names = [name for name in names if not only or name in only]
    if ordered:
        names.sort(key=lambda name: found[0].get(name, {}).get("value", math.inf))
    cells = [heads]
    for name in names:
        line = [cell(column[2], rows.get(name, {})) for column, rows in zip(columns, found)]
        cells.append([called(name), *line])
    return cells


def called(name):
    """A scorer's name for readers; a variant or a number stands for itself."""
    base, cut, _ = str(name).partition("@cut")
    return TABLES["names"].get(base, base) + (", one early cut" if cut else "")


def source(files, up):
    """Under a table: its files, and on what and at which commit they were measured."""
    found = [result(file) for file in files]

    def each(key):
        return ", ".join(dict.fromkeys(one[key] for one in found))

    links = ", ".join(f"[{file}.json]({up}results/{file}.json)" for file in files)
    return f"\n{links}; {each('hardware')}, {each('dtype')}; commit {each('commit')}\n"


EQUATIONS = ("module", "mask", "saliency", "MSE", "ranking, all stages",
             "ranking, one stage", "cross entropy", "the whole loss")


def equations():
    """Where each equation of the paper is computed: the lines that end in `# Eq. n`."""
    found = {}
    for name in ("model", "saliency", "predictor", "prune", "train", "infer"):
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        for line, code in enumerate(text.splitlines(), start=1):
            if mark := re.search(r" # Eq\. (\d)$", code):
                where = f"[{name}.py, line {line}]({name}.py#L{line}), `{around(text, line)}`"
                found[int(mark[1])] = where
    cells = [[f"Eq. {n}, {EQUATIONS[n - 1]}", found[n],
              "only with `--mask gumbel`" if n == 2 else "yes"] for n in sorted(found)]
    return [["paper", "here", "runs by default?"], *cells]


def around(text, line):
    """The dotted name of the functions and classes around a line of a module."""
    nodes = [node for node in ast.walk(ast.parse(text))
             if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return ".".join(node.name for node in nodes if node.lineno <= line <= node.end_lineno)


def markdown(rows):
    """A Markdown table of rows of cells, the head first."""
    text = ["| " + " | ".join(str(each).replace("|", "\\|") for each in row) + " |\n"
            for row in rows]
    text.insert(1, "|---" * len(rows[0]) + "|\n")
    return "".join(text)


def render(text, page):
    """A page with every table made anew; a marker without a table gets its table."""
    up = "../" * (len(Path(page).parts) - 1)

    def written(match):
        name = match[1]
        if name == "equations":
            made = markdown(equations())
        else:
            need("columns" in TABLES.get(name, ()), f"{page}: there is no table {name!r}")
            table = TABLES[name]
            files = dict.fromkeys("+".join(column[0] for column in table["columns"]).split("+"))
            made = markdown(lines(**table)) + ("" if "flops" in files else source(files, up))
        return f"<!-- table {name} -->\n{made}<!-- end -->"

    old_table = r"\n(?:(?!<!-- table ).)*?<!-- end -->"
    return re.sub(rf"<!-- table (\w+) -->(?:{old_table})?", written, text, flags=re.S)


# -------------------------------------------------------------------------------------- curves


def figures():
    """Draw quality against tokens kept, the speed-up against the prompt's length, and needles."""
    points = [(called(row["scorer"]).strip("*"), 100 * row["mean_keep"], row["vs_full"],
               row["vs_full_stderr"])
              for row in result("smollm2_tradeoff")["rows"] if "vs_full" in row]
    show.points(RESULTS / "smollm2_keep.png", points, xlabel="tokens kept, mean over blocks, %",
                ylabel="NLL per token above the full model")
    points = []
    for row in result("qwen05_speed_cpu")["bench"]:
        gain = row["speedup"]
        curves = {"prefill, by FLOPs": row["ideal"], "prefill, measured": gain["prefill"],
                  "end to end, by the floors": gain["e2e_by_floors"],
                  "end to end, measured": gain["e2e"]}
        points += [(label, row["n"], value, 0) for label, value in curves.items()]
    show.points(RESULTS / "qwen05_speed_cpu.png", points, xlabel="prompt tokens",
                ylabel="speed-up of SDTP")
    needles(("full", "predictor", "lookahead:32", "middle"), ("first", "last", "both"))


def needles(arms, places):
    """A panel for each method and place of the question: where is a hidden number still read?"""
    figure, panels = show.pyplot().subplots(len(places), len(arms), layout="constrained",
                                            figsize=(10, 7))
    for place, line in zip(places, panels):
        cells = [cell for file in RESULTS.glob(f"qwen05_needle_{place}*.json")
                 for cell in result(file.stem)["cells"]]
        for arm, ax in zip(arms, line):
            at = {(cell["depth"], cell["length"]): cell["probability"] for cell in cells
                  if cell["scorer"] == arm}
            depths, lengths = (sorted(set(axis)) for axis in zip(*at))
            image = ax.imshow([[at[d, n] for n in lengths] for d in depths], vmin=0, vmax=1,
                              aspect="auto")
            ax.set(xticks=range(len(lengths)), xticklabels=lengths, yticks=range(len(depths)),
                   yticklabels=depths, title=f"{called(arm).strip('*')}\nquestion {place}",
                   xlabel="prompt tokens", ylabel="depth, %")
    figure.colorbar(image, ax=panels, label="probability of a digit")
    show.save(figure, RESULTS / "qwen05_needle.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true",
                        help="write nothing; fail if a table is not what results/ says")
    parser.add_argument("--figures", action="store_true", help="also draw the curves of results/")
    args = parser.parse_args()
    if args.figures:
        figures()
    for page in PAGES:
        old = (ROOT / page).read_text(encoding="utf-8")
        new = render(old, page)
        need(new == old or not args.check,
             f"{page}: a table is not what results/ says: run python -m lab.report")
        (ROOT / page).write_text(new, encoding="utf-8")


if __name__ == "__main__":
    cli(main)
