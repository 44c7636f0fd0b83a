"""Every picture: a prompt's survivors, Figures 1, 2, 4 and 5, curves of training, quality and cost.

Text in the terminal and the page of survivors need nothing more; the rest needs matplotlib, which
is optional, and a picture of the page needs Chromium.

    python -m lab.figures survivors.html survivors.png          # the page of infer.py --html, drawn
    python -m lab.figures "survivors.html#3.17" survivors.png   # at stage 3, token 17 in focus
"""
import itertools
import json
import math
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

from prune import protected
from support.files import need
from support.options import at_least, cli, command_parser, output_file


# ------------------------------------------------------------------------- survivors of a prompt


def dropped_at(trace, n):
    """For each of n prompt tokens the stage (from 1) that dropped it, 0 for the survivors."""
    stage_of = [0] * n
    for number, stage in enumerate(trace, start=1):
        kept = set(stage.kept[0].tolist())
        for position in stage.seen[0].tolist():
            if position not in kept:
                stage_of[position] = number
    return stage_of


def colored(terminal):
    """Whether to print colours: on a terminal, unless its user has set NO_COLOR."""
    return terminal and not os.environ.get("NO_COLOR")


def survivors_text(pieces, stage_of, stages, color):
    """The prompt in the terminal: survivors bold, dropped tokens from dark (first) to bright.

    Without colour a dropped token is a dot.
    """
    def paint(text, stage):
        if stage == 0:
            return f"\x1b[1;30;48;5;114m{text}\x1b[0m"
        depth = (stage - 1) / max(1, stages - 1)
        grey = 236 + round(14 * depth)          # of the 256-colour ramp
        return f"\x1b[38;5;{grey}m{text}\x1b[0m"

    legend = [f"stage {s}: {stage_of.count(s)}" for s in range(1, stages + 1)]
    if colored(color):
        shown = [paint(piece, stage) for piece, stage in zip(pieces, stage_of)]
        legend = [paint(text, stage) for stage, text in enumerate(legend, start=1)]
    else:
        shown = ["\u00b7" if stage else piece for piece, stage in zip(pieces, stage_of)]
    count = f"kept to the end: {stage_of.count(0)} of {len(stage_of)}"
    return "".join(shown) + f"\n\n{count}; dropped by " + ", ".join(legend)


def scores_and_ranks(trace, fixed):
    """For each token its scores, and its ranks among those that compete, stage by stage.

    fixed: for each token whether it is protected; such a token has scores but no ranks.
    """
    scores = [[] for _ in fixed]
    ranks = [[] for _ in fixed]
    for stage in trace:
        values = stage.score[0].float().nan_to_num(-math.inf)
        score_of = dict(zip(stage.seen[0].tolist(), values.tolist()))
        for position, value in score_of.items():
            scores[position].append(round(value, 3))
        competing = [position for position in score_of if not fixed[position]]
        # the sort is stable: among equal scores the earlier token wins, as in prune.select
        competing.sort(key=score_of.get, reverse=True)
        for rank, position in enumerate(competing, start=1):
            ranks[position].append(rank)
    return scores, ranks


def survivors_page(path, pieces, stage_of, trace, schedule):
    """The same as one self-contained page, made from survivors.html.

    A slider goes through the stages. A token shows its score at every stage that saw it, and its
    rank among the tokens that compete; the protected ones do not.
    """
    n = len(pieces)
    pos = torch.arange(n)[None]                 # (1, n)
    fixed = protected(pos, [n], schedule.sink, schedule.local)[0].tolist()
    scores, ranks = scores_and_ranks(trace, fixed)
    names = ("piece", "stage", "fixed", "scores", "ranks")
    tokens = zip(pieces, stage_of, fixed, scores, ranks)
    data = {
        "stages": [],
        "tokens": [dict(zip(names, token)) for token in tokens],
    }
    for stage in trace:
        seen, kept = stage.seen.shape[1], stage.kept.shape[1]
        data["stages"].append({"block": stage.block, "seen": seen, "kept": kept})
    # "<" is escaped, so that no text of the prompt can close the script
    text = json.dumps(data).replace("<", "\\u003c")
    template = Path(__file__).with_name("survivors.html").read_text(encoding="utf-8")
    Path(path).write_text(template.replace("DATA", text, 1), encoding="utf-8")


def browser():
    """The command of a headless Chromium or Chrome, None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        return None
    command = [found, "--headless=new", "--disable-gpu", "--hide-scrollbars"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:    # Chromium has no sandbox for root
        command.append("--no-sandbox")
    return command


def screenshot(page, png, width, height, dark=False):
    """A page, with #STAGE.TOKEN after it if a view is to be shown, as a PNG."""
    path, hash_sign, view = page.partition("#")
    need(Path(path).is_file(), f"{path}: no such file")
    command = browser()
    need(command, "a picture of a page needs Chromium or Chrome on the path")
    address = Path(path).resolve().as_uri() + hash_sign + view
    with tempfile.TemporaryDirectory() as profile:
        options = [f"--user-data-dir={profile}",
                   f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                   f"--window-size={width},{height}",
                   f"--screenshot={Path(png).resolve()}"]
        subprocess.run([*command, *options, address], check=True, capture_output=True)
    try:
        from PIL import Image       # comes with matplotlib
    except ImportError:
        return
    # 256 colours: a third of the bytes
    small = Image.open(png).quantize(256, Image.Quantize.MAXCOVERAGE)
    small.save(png, optimize=True)


# -------------------------------------------------------------------------- figures of the paper


DOTS = {"marker": "o", "ms": 3}
BARS = {**DOTS, "capsize": 2}
IDEAL = {"color": "black", "ls": "--", "lw": 1}


def pyplot():
    """matplotlib, an optional extra, without a display."""
    try:
        import matplotlib
    except ImportError:
        wanted = "pictures need the optional package matplotlib: pip install matplotlib"
        raise ImportError(wanted) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save(figure, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")      # a token that the font cannot draw
        figure.savefig(path, dpi=110, bbox_inches="tight")


def per_block(saliency):
    """Saliency (L, n) divided by the largest of its block."""
    return saliency / saliency.amax(-1, keepdim=True).clamp(min=1e-30)


def heat_text(saliency, labels, color):
    """Figure 1 in the terminal: saliency (L, n), one line a token, one cell a block."""
    color = colored(color)

    def cell(value):
        if color:
            return f"\x1b[48;5;{232 + round(23 * value ** 0.5)}m  \x1b[0m"
        return 2 * " .:-=+*#%@"[round(9 * value ** 0.5)]

    lines = ["block "]
    for block in range(1, len(saliency) + 1):
        lines[0] += f"{block:>2}" if block % 4 == 0 else "  "
    columns = per_block(saliency).T.tolist()
    for column, label in zip(columns, labels):
        cells = "".join(map(cell, column))
        lines.append(f"      {cells}  " + label.replace("\n", "\\n"))
    return "\n".join(lines)


def token_name(label, most=12):
    """A token under its column: no blanks around it, and no formula of matplotlib's."""
    name = label.strip() or repr(label)[1:-1]
    name = name if len(name) <= most else name[:most - 1] + "\u2026"
    return name.replace("$", "\\$")


def figure1(saliency, labels, path):
    """Saliency (L, n) of each prompt token at each block, wrapped like a text."""
    blocks, n = saliency.shape
    most = max(60, math.ceil(n / 40))           # tokens in a line; at most 40 lines
    lines = math.ceil(n / most)
    width = math.ceil(n / lines)
    height, names = max(0.8, 0.07 * blocks), 0.85       # of a line and of its labels, in inches
    top = 0.7                                           # the scale
    total = top + lines * (height + names)
    figure = pyplot().figure(figsize=(max(6, 0.17 * width), total))
    shares = per_block(saliency).cpu().numpy()
    for start in range(0, n, width):
        part = shares[:, start:start + width]
        end = start + part.shape[1]
        ax = figure.add_axes((0, 1 - (top + height) / total, 1, height / total))
        top += height + names
        image = ax.imshow(part, extent=(start - 0.5, end - 0.5, blocks + 0.5, 0.5), aspect="auto",
                          cmap="viridis", vmin=0, vmax=1)
        ax.set_xlim(start - 0.5, start + width - 0.5)   # the last line may be shorter
        ax.set_xticks(range(start, end), map(token_name, labels[start:end]), rotation=90,
                      fontsize=7)
        ax.locator_params(axis="y", integer=True)
        ax.set(ylabel="block")
    scale = figure.add_axes((0, 1 - 0.35 / total, 0.4, 0.15 / total))
    figure.colorbar(image, cax=scale, orientation="horizontal")
    scale.set_title("Saliency of each prompt token, normalised per block", loc="left", fontsize=10)
    save(figure, path)


def figure2(values, path, title):
    """Sparsity of the salient tokens against depth."""
    figure, ax = pyplot().subplots(figsize=(6, 3.5))
    blocks = range(1, len(values) + 1)
    ax.plot(blocks, values, **DOTS)
    ax.set(xlabel="block", ylabel="sparsity", ylim=(0, 1), title=title)
    save(figure, path)


def sweep(rows, keeps, label, title, path):
    """Figures 4 and 5: cost in likelihood of the rows of lab/ablations.py.

    keeps: one line for each, of the rows whose name ends so; "" takes all rows.
    """
    figure, ax = pyplot().subplots(figsize=(6, 3.5))
    for keep in keeps:
        line = [row for row in rows if row["scorer"].endswith(keep)]
        cost = [row["vs_full"] for row in line]
        errors = [row["vs_full_stderr"] for row in line]
        name = f"keep {keep}" if keep else None
        ax.errorbar(range(1, len(line) + 1), cost, errors, **BARS, label=name)
    ax.axhline(0, color="grey", lw=0.8)
    ax.set(xlabel=label, ylabel="NLL per token above the full model", title=title)
    if len(keeps) > 1:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


# ------------------------------------------------------------------------------------------ curves


def curve(log, path):
    """The training curve: every loss, and the likelihood of held-out rows under each scorer."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9, 3.2))
    steps = [entry["step"] for entry in log]
    width = max(1, len(log) // 50)              # of the running mean
    for name in log[0]:
        if name in ("step", "heldout", "loss"):
            continue
        values = torch.tensor([entry[name] for entry in log])
        smooth = values.unfold(0, width, 1).mean(-1)
        left.plot(steps[width - 1:], smooth, label=name)
    left.set(xlabel="step", ylabel="loss (ranking and MSE: sum over stages)")
    left.legend()
    heldout = [entry for entry in log if "heldout" in entry]
    measured = [entry["step"] for entry in heldout]
    for name in ("random", "recent", "sdtp", "oracle", "full"):
        nll = [entry["heldout"][f"nll_{name}"] for entry in heldout]
        right.plot(measured, nll, **DOTS, label=name)
    right.set(xlabel="step", ylabel="NLL per token, held-out rows")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, fontsize=8)
    save(figure, path)


# Okabe and Ito's colours, safe for the colour-blind
COLORS = ("#d55e00", "#0072b2", "#000000", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
MARKERS = "osx^v<>D"


def tradeoff(lines, full, path, title):
    """Quality against tokens kept, errors paired with the full model.

    lines: {scorer's name: rows of lab/ablations.py}; full: the full model's row.
    """
    figure, ax = pyplot().subplots(figsize=(6.4, 4))
    looks = zip(itertools.cycle(COLORS), itertools.cycle(MARKERS))
    for name, (color, marker) in zip(lines, looks):
        rows = lines[name]
        kept = [100 * row["mean_keep"] for row in rows]
        nll = [row["value"] for row in rows]
        errors = [row.get("vs_full_stderr", 0) for row in rows]
        ax.errorbar(kept, nll, errors, color=color, marker=marker, ms=5,
                    lw=1.4, capsize=2, label=name)
    ax.axhline(full["value"], color="grey", ls="--", lw=1, label="full model")
    ax.set(xlabel="tokens kept, mean over blocks (%)", ylabel="NLL per response token")
    ax.set_title(title, fontsize=10)
    ax.invert_xaxis()               # from gentle to harsh
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def plot_prefill(ax, n, rows):
    """Seconds of every arm, and the curve that full's time and the FLOPs would give SDTP."""
    for name in ("transformers", "full", "sdtp"):
        if name not in rows[0]:
            continue
        middle = [row[name]["prefill_s"] for row in rows]
        below, above = [], []
        for row in rows:
            low, high = row[name]["prefill_spread_s"]
            below.append(abs(row[name]["prefill_s"] - low))
            above.append(abs(row[name]["prefill_s"] - high))
        ax.errorbar(n, middle, [below, above], **BARS, label=name)
    ideal = [row["full"]["prefill_s"] / row["ideal"] for row in rows]
    ax.plot(n, ideal, **IDEAL, label="full / ideal")
    ax.set(yscale="log", ylabel="prefill, seconds")


def plot_speedup(ax, n, rows):
    """Speed-up of the prefill and, where tokens were decoded, of the whole."""
    def gain(part):
        return [row["speedup"][part] for row in rows]

    ideal = [row["ideal"] for row in rows]
    ax.plot(n, gain("prefill"), **DOTS, label="prefill, measured")
    ax.plot(n, ideal, **IDEAL, label="prefill, ideal by FLOPs")
    if rows[0]["full"]["decode_s"]:
        ax.plot(n, gain("e2e"), **DOTS, label="end to end, measured")
        ax.plot(n, gain("e2e_by_floors"), ":", color="grey", label="end to end, by the floors")
    ax.set(ylabel="speed-up of SDTP")


def cost_against_length(rows, path, title):
    """Cost against length: rows of lab/speed.py's bench."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9, 3.4))
    n = [row["n"] for row in rows]
    plot_prefill(left, n, rows)
    plot_speedup(right, n, rows)
    for ax in (left, right):
        ax.set(xscale="log", xlabel="prompt tokens")
        ax.set_xticks(n, [str(length) for length in n], rotation=45)
        ax.minorticks_off()
        ax.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def needle_maps(rows, path):
    """Rows of lab/needle.py: a map for each arm and place of the question, depth by length.

    A cell's colour and number: the probability of a digit of the needle.
    """
    arms, places, lengths, depths = (list(dict.fromkeys(row[key] for row in rows))
                                     for key in ("scorer", "question", "n", "depth"))
    size = 1.2 + 0.62 * len(lengths), 0.8 + 0.42 * len(depths)
    figure, axes = pyplot().subplots(len(places), len(arms), squeeze=False, sharex=True,
                                     sharey=True, layout="constrained",
                                     figsize=(size[0] * len(arms), size[1] * len(places)))
    for i, place in enumerate(places):
        for j, arm in enumerate(arms):
            ax = axes[i][j]
            value = {(row["depth"], row["n"]): row["probability"] for row in rows
                     if (row["scorer"], row["question"]) == (arm, place)}
            cells = [[value[depth, n] for n in lengths] for depth in depths]
            image = ax.imshow(cells, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
            for y, line in enumerate(cells):
                for x, p in enumerate(line):
                    ax.text(x, y, f"{p:.2f}".lstrip("0") if p < 0.995 else "1", fontsize=8,
                            ha="center", va="center")
            if i == 0:
                ax.set_title(arm.replace(", ", "\n").replace("*", ""), fontsize=9)
            ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
            ax.set_yticks(range(len(depths)), [f"{depth}%" for depth in depths], fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("prompt tokens", fontsize=8)
    for line, place in zip(axes, places):
        line[0].set_ylabel(f"question {place}\nneedle's depth", fontsize=8)
    figure.colorbar(image, ax=axes, label="probability of a digit", shrink=0.8)
    save(figure, path)


def main():
    parser = command_parser(__doc__)
    parser.add_argument("page", help="a page of infer.py --html, with #STAGE or #STAGE.TOKEN "
                                     "after it if it is to open there")
    parser.add_argument("png", type=output_file, help="the picture to write")
    parser.add_argument("--size", type=at_least(1), nargs=2, default=(1200, 800),
                        metavar=("W", "H"), help="in pixels")
    parser.add_argument("--dark", action="store_true", help="in the dark colours")
    args = parser.parse_args()
    screenshot(args.page, args.png, *args.size, args.dark)
    print(f"wrote {args.png}")


if __name__ == "__main__":
    cli(main)
