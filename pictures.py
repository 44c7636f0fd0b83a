"""Every picture: survivors of a prompt in the terminal and as a page, Figures 1, 2, 4 and 5, training curve, cost and quality curves.

matplotlib is an optional extra; what is printed as text, and the page, need nothing.

    python pictures.py survivors.html survivors.png          # a picture of the page that infer.py --html wrote (needs Chromium)
    python pictures.py "survivors.html#3.17" survivors.png   # at stage 3, token 17 in focus
"""
import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from common import at_least, cli
from model import need
from prune import local_tokens


def dropped_at(trace, n):
    """For each of n prompt tokens the stage (from 1) that dropped it, 0 for the survivors."""
    stage_of = [0] * n
    for s, stage in enumerate(trace, start=1):
        for position in set(stage.seen[0].tolist()) - set(stage.kept[0].tolist()):
            stage_of[position] = s
    return stage_of


def survivors_text(pieces, stage_of, stages, color):
    """The prompt in the terminal: survivors bold, dropped tokens from dark (dropped first) to bright; without colour, a dot each."""
    def shade(s):                   # 256-colour ramp of greys
        return 236 + round(14 * (s - 1) / max(1, stages - 1))
    out = []
    for piece, s in zip(pieces, stage_of):
        if not color:
            out.append(piece if s == 0 else "\u00b7")
        else:
            out.append(f"\x1b[1;30;48;5;114m{piece}\x1b[0m" if s == 0 else f"\x1b[38;5;{shade(s)}m{piece}\x1b[0m")
    legend = [f"stage {s}: {stage_of.count(s)}" for s in range(1, stages + 1)]
    if color:
        legend = [f"\x1b[38;5;{shade(s)}m{text}\x1b[0m" for s, text in enumerate(legend, start=1)]
    return "".join(out) + f"\n\nkept to the end: {stage_of.count(0)} of {len(stage_of)}; dropped by " + ", ".join(legend)


def survivors_page(path, pieces, stage_of, trace, schedule):
    """The same as one self-contained page (template: pictures.html): a slider through the stages, and each token's score at every
    stage that saw it, with its rank among the tokens that compete (the protected ones do not)."""
    n = len(pieces)
    fixed = [p < schedule.sink or p >= n - local_tokens(n, schedule.local) for p in range(n)]
    scores, ranks = [[] for _ in pieces], [[] for _ in pieces]
    for stage in trace:
        values = dict(zip(stage.seen[0].tolist(), stage.score[0].float().nan_to_num(-math.inf).tolist()))
        for p, value in values.items():
            scores[p].append(round(value, 3))
        for rank, p in enumerate(sorted((p for p in values if not fixed[p]), key=lambda p: -values[p]), start=1):
            ranks[p].append(rank)   # the sort is stable: among equal scores the earlier token wins, as in prune.select
    data = {"stages": [{"block": stage.block, "seen": stage.seen.shape[1], "kept": stage.kept.shape[1]} for stage in trace],
            "tokens": [{"piece": p, "stage": s, "fixed": f, "scores": v, "ranks": r} for p, s, f, v, r in zip(pieces, stage_of, fixed, scores, ranks)]}
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    # "<" escaped: no text of the prompt can close the script
    Path(path).write_text(page.replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1), encoding="utf-8")


def browser():
    """The command of a headless Chromium or Chrome, None where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    root = hasattr(os, "geteuid") and os.geteuid() == 0              # Chromium has no sandbox for root
    return found and [found, "--headless=new", "--disable-gpu", "--hide-scrollbars", *["--no-sandbox"] * root]


def screenshot(page, png, width, height, dark=False):
    """A page, with #STAGE.TOKEN after it if a view is to be shown, as a PNG."""
    path, _, view = page.partition("#")
    need(Path(path).is_file(), f"{path}: no such file")
    need(browser(), "a picture of a page needs Chromium or Chrome on the path")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run([*browser(), f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},{height}",
                        f"--screenshot={Path(png).resolve()}", Path(path).resolve().as_uri() + "#" * bool(view) + view], check=True, capture_output=True)
    try:
        from PIL import Image       # comes with matplotlib: 256 colours, a third of the bytes
    except ImportError:
        return
    Image.open(png).quantize(256, Image.Quantize.MAXCOVERAGE).save(png, optimize=True)


def heat_text(s, labels, color):
    """Figure 1 in the terminal: s (L, n) normalised per block, one line a token, one cell a block."""
    s = s / s.amax(-1, keepdim=True).clamp(min=1e-30)
    shades = " .:-=+*#%@"
    lines = ["block " + "".join(f"{i:>2}" if i % 4 == 0 else "  " for i in range(1, len(s) + 1))]
    for column, label in zip(s.T.tolist(), labels):
        cells = "".join(f"\x1b[48;5;{232 + round(23 * v ** 0.5)}m  \x1b[0m" if color else 2 * shades[round(9 * v ** 0.5)] for v in column)
        lines.append("      " + cells + "  " + label.replace("\n", "\\n"))
    return "\n".join(lines)


def figure1(s, labels, path):
    plt = pyplot()
    s = (s / s.amax(-1, keepdim=True).clamp(min=1e-30)).cpu()
    fig, ax = plt.subplots(figsize=(max(6, 0.16 * len(labels)), 1.5 + 0.16 * len(s)))
    image = ax.imshow(s, aspect="auto", cmap="viridis", vmin=0, vmax=1, extent=(-0.5, len(labels) - 0.5, len(s) + 0.5, 0.5))
    ax.set_xticks(range(len(labels)), [label.strip() or repr(label)[1:-1] for label in labels], rotation=90, fontsize=6)
    ax.set(ylabel="block", title="Saliency, normalised per block")
    fig.colorbar(image, ax=ax, pad=0.01)
    fig.savefig(path, dpi=110, bbox_inches="tight")


def figure2(values, path, title):
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6, 3.5))
    ax.plot(range(1, len(values) + 1), values, marker="o", ms=3)
    ax.set(xlabel="block", ylabel="sparsity", ylim=(0, 1), title=title)
    fig.savefig(path, dpi=110, bbox_inches="tight")


def pyplot():
    """matplotlib, an optional extra, without a display."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("pictures need the optional package matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def sweep(rows, keeps, label, title, path):
    """Figures 4 and 5: rows of study.py, one line a keep ratio (the end of a row's name; "" for all rows), cost in NLL."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6, 3.5))
    for keep in keeps:
        line = [r for r in rows if r["scorer"].endswith(keep)]
        ax.errorbar(range(1, len(line) + 1), [r["vs_full"] for r in line], [r["vs_full_stderr"] for r in line], marker="o", ms=3, capsize=2, label=f"keep {keep}" if keep else None)
    ax.axhline(0, color="grey", lw=0.8)
    ax.set(xlabel=label, ylabel="NLL per token above the full model", title=title)
    if len(keeps) > 1:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    fig.savefig(path, dpi=110, bbox_inches="tight")


def curve(log, path):
    """The training curve: every loss (running mean), and the pruned likelihood of the held-out rows between full and random."""
    plt = pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for name in [k for k in log[0] if k not in ("step", "heldout", "loss")]:
        values = torch.tensor([entry[name] for entry in log])
        width = max(1, len(values) // 50)
        left.plot([entry["step"] for entry in log][width - 1:], values.unfold(0, width, 1).mean(-1), label=name)
    left.set(xlabel="step", ylabel="loss (ranking and MSE: sum over stages)")
    left.legend()
    found = [(entry["step"], entry["heldout"]) for entry in log if "heldout" in entry]
    for name in ("random", "recent", "sdtp", "oracle", "full"):
        right.plot([step for step, _ in found], [report[f"nll_{name}"] for _, report in found], marker="o", ms=3, label=name)
    right.set(xlabel="step", ylabel="NLL per token, held-out rows")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, fontsize=8)
    fig.savefig(path, dpi=110, bbox_inches="tight")


def tradeoff(lines, full, path, title):
    """Quality against tokens kept: lines {scorer's name: rows of study.py}, full the full model's row; errors paired with it."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6.4, 4))
    colors = ("#d55e00", "#0072b2", "#000000", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")      # Okabe and Ito's, safe for the colour-blind
    for (name, rows), color, marker in zip(lines.items(), itertools.cycle(colors), itertools.cycle("osx^v<>D")):
        ax.errorbar([100 * r["mean_keep"] for r in rows], [r["value"] for r in rows], [r.get("vs_full_stderr", 0) for r in rows], color=color, marker=marker, ms=5, lw=1.4, capsize=2, label=name)
    ax.axhline(full["value"], color="grey", ls="--", lw=1, label="full model")
    ax.set(xlabel="tokens kept, mean over blocks (%)", ylabel="NLL per response token")
    ax.set_title(title, fontsize=10)
    ax.invert_xaxis()               # from gentle to harsh
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    fig.savefig(path, dpi=110, bbox_inches="tight")


def cost_against_length(rows, path, title):
    """Cost against length: prefill of both arms, and the curve that full's time and the FLOPs would give SDTP."""
    plt = pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    n = [row["n"] for row in rows]
    for name in [name for name in ("transformers", "full", "sdtp") if name in rows[0]]:
        left.errorbar(n, [row[name]["prefill_s"] for row in rows], [[abs(row[name]["prefill_s"] - row[name]["prefill_spread_s"][i]) for row in rows] for i in (0, 1)], marker="o", ms=3, capsize=2, label=name)
    left.plot(n, [row["full"]["prefill_s"] / row["ideal"] for row in rows], "k--", lw=1, label="full / ideal")
    left.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="prefill, seconds")
    left.set_xticks(n, [str(m) for m in n], rotation=45)
    right.plot(n, [row["speedup"]["prefill"] for row in rows], marker="o", ms=3, label="prefill, measured")
    right.plot(n, [row["ideal"] for row in rows], "k--", lw=1, label="prefill, ideal by FLOPs")
    if rows[0]["full"]["decode_s"]:
        right.plot(n, [row["speedup"]["e2e"] for row in rows], marker="o", ms=3, label="end to end, measured")
        right.plot(n, [row["speedup"]["e2e_by_floors"] for row in rows], ":", color="grey", label="end to end, by the floors")
    right.set(xscale="log", xlabel="prompt tokens", ylabel="speed-up of SDTP")
    right.set_xticks(n, [str(m) for m in n], rotation=45)
    for ax in (left, right):
        ax.minorticks_off()
        ax.legend(fontsize=8)
    fig.suptitle(title, fontsize=9)
    fig.savefig(path, dpi=110, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", help="a page of infer.py --html, with #STAGE or #STAGE.TOKEN after it if it is to open there")
    parser.add_argument("png", help="the picture to write")
    parser.add_argument("--size", type=at_least(1), nargs=2, default=(1200, 800), metavar=("W", "H"), help="in pixels")
    parser.add_argument("--dark", action="store_true", help="in the dark colours")
    args = parser.parse_args()
    screenshot(args.page, args.png, *args.size, args.dark)
    print(f"wrote {args.png}")


if __name__ == "__main__":
    cli(main)
