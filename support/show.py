"""All that the six modules print or draw; numbers and texts are passed in, no models.

Text in the terminal and the page of survivors need nothing more; pictures need matplotlib, which
is optional.
"""
import itertools
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path

import torch

from support.options import beside, hardware, processor


# ------------------------------------------------------------------------------- both arms' answers


class Writer:
    """For infer.ask's stop: prints an answer as it grows, behind the name of its arm."""

    def __init__(self, name, question, tokenizer):
        self.question, self.tokenizer, self.shown = question, tokenizer, ""
        print(f"{name:4}  {question.text}", end=" " * bool(question.text), flush=True)

    def __call__(self, tokens):
        text = self.tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):             # a character may take several tokens
            print(text[len(self.shown):], end="", flush=True)
            self.shown = text

    def end(self, said):
        """End the line -> what an infer.Said is, a dict; it is right if it holds the expected."""
        text = self.tokenizer.decode(said.tokens[:-1] if said.ended else said.tokens)
        told = {"question": self.question.text, "text": text, "expected": self.question.expected,
                "new_tokens": len(said.tokens)}
        verdict = ""
        if told["expected"] is not None:
            words, wanted = (re.findall(r"\w+", each.lower()) for each in (text, told["expected"]))
            told["right"] = f" {' '.join(wanted)} " in f" {' '.join(words)} "
            verdict = " (right)" if told["right"] else f" (wrong, expected {told['expected']!r})"
        print(f"{text[len(self.shown):]}{verdict}", flush=True)
        return told


def arms(prompt, read, trace, row, fixed, html=None):
    """What was dropped, times, FLOPs and bytes of both arms -> a dict.

    prompt: a support.options.Prompt; read: {"full", "sdtp"} as infer.answer makes them; row: their
    times and costs, see support.runs.table_row; fixed: for each token whether it is protected;
    html: where to write the page of survivors.
    """
    n, stage_of = len(prompt.ids), dropped_at(trace, len(prompt.ids))
    pieces = prompt.tokenizer.pieces(prompt.ids)
    print(f"\n{survivors_text(pieces, stage_of, len(trace))}\n")
    if html:
        survivors_page(html, pieces, stage_of, trace, fixed, read)
        print(f"wrote {html}")
    result = {"prompt_tokens": n, "stage_of": stage_of, "ideal": row["ideal"],
              **{name: told | row[name] for name, told in read.items()}}
    for name, told in read.items():
        print(in_words(name, result[name]))
    idle = [s for s, stage in enumerate(trace, start=1) if stage.seen.shape == stage.kept.shape]
    if idle:
        print(f"stages {idle} found nothing to drop: what they would is protected")
    full, sdtp = result["full"], result["sdtp"]
    print(f"\n{n} prompt tokens, {1 - sdtp['counts'][-1] / n:.0%} dropped by the last stage; "
          f"prefill {row['speedup']['prefill']:.2f}x as fast (ideal by FLOPs {row['ideal']:.2f}x), "
          f"KV cache {1 - sdtp['kv_bytes'] / full['kv_bytes']:.0%} smaller{noise(row)}")
    return result


def hint(model, slow):
    """Say that a slow run in fp32 is on a processor that multiplies bfloat16."""
    fp32 = model.device.type == "cpu" and model.dtype == torch.float32
    if slow and fp32 and re.search("avx512_bf16|amx_bf16", processor()):
        print("\nthis processor has bfloat16: --dtype bfloat16 reads a prompt faster, in half the "
              "memory")


def noise(row):
    """What is to be said of times that are one each, or that other work here has changed."""
    spread = max(row[name]["prefill_spread_s"][1] / row[name]["prefill_spread_s"][0]
                 for name in ("full", "sdtp"))
    return ("\n(each arm was timed once: --repeats 5 takes medians)" * (row["repeats"] == 1)
            + "\n(this machine was busy: times differ by more than the method does)"
            * (spread > 1.2 or row["share_of_ideal"] > 1.1))


def in_words(name, told):
    """An arm in two lines."""
    groups = itertools.groupby(told["counts"])
    counts = ", ".join(f"{n} x{len(list(group))}" for n, group in groups)
    low, high = (1e3 * seconds for seconds in told["prefill_spread_s"])
    return (f"{name:4}  prefill {1e3 * told['prefill_s']:.0f} ms ({low:.0f} to {high:.0f}), decode "
            f"{1e3 * told['decode_s']:.1f} ms a token, {told['flops'] / 1e9:.2f} GFLOPs, KV "
            f"{told['kv_bytes'] / 1e6:.2f} MB; read and answered in {told['total_s']:.2f} s\n"
            f"      tokens per block {counts}")


def dropped_at(trace, n):
    """For each of n prompt tokens the stage (from 1) that dropped it, 0 for the survivors."""
    stage_of = [0] * n
    for s, stage in enumerate(trace, start=1):
        for position in set(stage.seen[0].tolist()) - set(stage.kept[0].tolist()):
            stage_of[position] = s
    return stage_of


def survivors_text(pieces, stage_of, stages, most=300):
    """The prompt in the terminal: survivors bold, dropped tokens from dark (first) to bright.

    Without colour a dropped token is a dot. Of more than `most` tokens only the ends are shown.
    """
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def paint(text, s):
        grey = 236 + round(14 * (s - 1) / max(1, stages - 1))       # of the 256-colour ramp
        return f"\x1b[38;5;{grey}m{text}\x1b[0m" if s else f"\x1b[1;30;48;5;114m{text}\x1b[0m"

    legend = [f"stage {s}: {stage_of.count(s)}" for s in range(1, stages + 1)]
    if color:
        shown = list(map(paint, pieces, stage_of))
        legend = map(paint, legend, range(1, stages + 1))
    else:
        shown = ["\u00b7" if s else piece for piece, s in zip(pieces, stage_of)]
    left_out, head = len(shown) - most, 2 * most // 3
    if left_out > 0:
        shown[head:head + left_out] = [f" [... {left_out} tokens ...] "]
    count = f"kept to the end: {stage_of.count(0)} of {len(stage_of)}"
    dot = "" if color else "a dot is a dropped token; "
    return "".join(shown) + f"\n\n{dot}{count}; dropped by " + ", ".join(legend)


def survivors_page(path, pieces, stage_of, trace, fixed, read):
    """The same, with the answers, as one self-contained page, made from survivors.html.

    A slider goes through the stages. A token shows its score at every stage that saw it, and its
    rank among the tokens that compete; the protected ones, `fixed`, do not.
    """
    tokens = [{"piece": piece, "stage": s, "fixed": kept, "scores": [], "ranks": []}
              for piece, s, kept in zip(pieces, stage_of, fixed)]
    for stage in trace:
        scores = stage.scores[0].float().nan_to_num(-1e9).tolist()
        score_of = dict(zip(stage.seen[0].tolist(), scores))
        for position, value in score_of.items():
            tokens[position]["scores"].append(round(value, 3))
        competing = [position for position in score_of if not fixed[position]]
        # the sort is stable: among equal scores the earlier token wins, as in prune.select
        competing.sort(key=score_of.get, reverse=True)
        for rank, position in enumerate(competing, start=1):
            tokens[position]["ranks"].append(rank)
    stages = [{"block": stage.block, "seen": stage.seen.shape[1], "kept": stage.kept.shape[1]}
              for stage in trace]
    # "<" is escaped, so that no text of the prompt can close the script
    answers = [{"arm": name, **each} for name, told in read.items() for each in told["answers"]]
    told = {"answers": answers, "stages": stages, "tokens": tokens}
    text = json.dumps(told).replace("<", "\\u003c")
    template = Path(__file__).with_name("survivors.html").read_text(encoding="utf-8")
    Path(path).write_text(template.replace("DATA", text, 1), encoding="utf-8")


# ------------------------------------------------------------------------------------ Table 2


def flops(name, after, keep, pruned, rows):
    """The rows of prune.flops_row, stages after the blocks `after`."""
    print(f"{name}: {len(after)} stages after blocks {after}, keep {keep}: {pruned:.0%} of the "
          f"prompt dropped by the last\ntokens per block at N = {rows[0]['n']}: "
          f"{rows[0]['counts']}\n"
          "           TFLOPs, exact                      TFLOPs, the paper's         KV cache, GB\n"
          "      N     full     SDTP  saved  ideal       full     SDTP  saved       full     SDTP")
    for row in rows:
        (full, sdtp), (a, b) = row["exact"], row["paper"]
        print(f"{row['n']:7d} {full / 1e12:8.2f} {sdtp / 1e12:8.2f} {1 - sdtp / full:6.1%} "
              f"{full / sdtp:5.2f}x   {a / 1e12:8.2f} {b / 1e12:8.2f} {1 - b / a:6.1%}   "
              + " ".join(f"{size / 1e9:8.2f}" for size in row["kv_bytes"]))


def bench(model, rows, new):
    """Print the rows of infer.bench as they come -> a list of them."""
    print(f"{hardware(model.device)}, {model.dtype}; {new} new tokens; medians, arms in turn\n"
          "      N  arm      prefill s (min to max)     decode ms  end to end s     KV GB")
    found = []
    for row in rows:
        found.append(row)
        for name in ("full", "sdtp"):
            arm = row[name]
            low, high = arm["prefill_spread_s"]
            print(f"{row['n']:7d}  {name:4} {arm['prefill_s']:10.3f} ({low:.3f} to {high:.3f}) "
                  f"{1e3 * arm['decode_s']:12.2f} {arm['e2e_s']:13.3f} "
                  f"{arm['kv_bytes'] / 1e9:9.3f}")
        print(f"         prefill {row['speedup']['prefill']:.2f}x as fast, "
              f"{row['share_of_ideal']:.0%} of the ideal by FLOPs, {row['ideal']:.2f}x; end to end "
              f"{row['speedup']['e2e']:.2f}x", flush=True)
    return found


# ------------------------------------------------------------------------------------ training


def trained(args, log, out, seconds):
    """What stands last of a training, and its curve -> a dict."""
    if args.png:
        curve(log, args.png)
    words = [] if args.ckpt == "toy" else ["--ckpt", args.ckpt]
    words += ["--predictors", args.out] if args.out else []
    print(f"wrote {out} after {seconds:.0f} s; next: {beside('infer.py', *words)}")
    return {"seconds": seconds, "out": str(out), "log": log}


def curve(log, path):
    """The training curve: every loss, and the likelihood of held-out rows."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.2))
    heldout = [{"step": entry["step"], **entry["heldout"]} for entry in log if "heldout" in entry]
    labels = "loss (ranking and MSE: sum over stages)", "NLL per token, held-out rows"
    for ax, entries, label in zip(axes, (log, heldout), labels):
        for name in (entries or [{}])[0].keys() - {"step", "heldout", "loss", "kept"}:
            steps, values = zip(*((entry["step"], entry[name]) for entry in entries))
            ax.plot(steps, values, label=name)
        ax.set(xlabel="step", ylabel=label)
        ax.legend()
    save(figure, path)


# ------------------------------------------------------------------------------ Figures 1 and 2


def figure1(s, example, tokenizer, png):
    """Figure 1 in the terminal, and as a picture: s (L, P) -> the numbers, a dict."""
    labels = tokenizer.pieces(example.tokens[:example.prompt_len].tolist())
    shares = s / s.amax(-1, keepdim=True).clamp(min=1e-30)          # of the block's largest
    print("block " + "".join(f"{b:>2}" if b % 4 == 0 else "  " for b in range(1, len(s) + 1)))
    for column, label in zip(shares.T.tolist(), labels):
        cells = "".join(2 * " .:-=+*#%@"[round(9 * value ** 0.5)] for value in column)
        print(f"      {cells}  " + label.replace("\n", "\\n"))
    if png:
        heat_map(shares, labels, png)
    return {"tokens": labels, "saliency": s.tolist()}


def heat_map(shares, labels, path):
    """Shares (L, P) of each prompt token at each block, wrapped like a text."""
    width = min(len(labels), 75)                                    # tokens in a line
    lines = math.ceil(len(labels) / width)
    figure, axes = pyplot().subplots(lines, figsize=(max(6, 0.17 * width), 1.8 * lines + 1),
                                     squeeze=False, layout="constrained")
    for i, ax in enumerate(axes[:, 0]):
        part = slice(i * width, (i + 1) * width)
        names = [label.strip().replace("$", "\\$")[:12] for label in labels[part]]
        extent = -0.5, len(names) - 0.5, len(shares) + 0.5, 0.5     # blocks count from 1
        image = ax.imshow(shares[:, part].numpy(), aspect="auto", extent=extent, vmin=0, vmax=1)
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        ax.set(xlim=(-0.5, width - 0.5), ylabel="block")            # the last line may be shorter
    figure.colorbar(image, ax=axes, location="top", shrink=0.4, label="saliency, per block")
    save(figure, path)


def figure2(found, name, png):
    """Figure 2: the sparsity after each block, (rows, L), averaged over rows -> a dict."""
    rows, values = len(found), found.mean(0).tolist()
    for b, value in enumerate(values, start=1):
        print(f"block {b:3d}  sparsity {value:.3f}  " + "#" * round(50 * value))
    if png:
        points(png, [(name, b, value, 0) for b, value in enumerate(values, start=1)],
               xlabel="block", ylabel="sparsity", ylim=(0, 1),
               title=f"Sparsity of salient tokens, {rows} rows")
    return {"rows": rows, "sparsity": values}


def points(path, found, **axis):
    """A picture: a line for each label of `found`, (label, x, y, error of y) each."""
    figure, ax = pyplot().subplots()
    for marker, label in zip("osx^v<>D", dict.fromkeys(point[0] for point in found)):
        _, x, y, error = zip(*(point for point in found if point[0] == label))
        ax.errorbar(x, y, error, marker=marker, capsize=2, label=label)
    ax.set(**axis)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def pyplot():
    """matplotlib, an optional extra, without a display."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("pictures need the optional package matplotlib: pip install matplotlib"
                          ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save(figure, path):
    """Write a picture."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")      # a token that the font cannot draw
        figure.savefig(path, dpi=110, bbox_inches="tight")
