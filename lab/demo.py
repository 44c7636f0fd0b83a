"""What the demos of infer.py and saliency.py print and draw."""
import itertools
import sys

from lab.figures import (dropped_at, figure1, figure2, heat_text, survivors_page, survivors_text)
from prune import flops
from support.prompts import SHORT


def show_figure1(s, tokenizer, example, png):
    """Figure 1 in the terminal, and as a picture: s (L, prompt_len) -> the numbers, a dict."""
    prompt = example.tokens[:example.prompt_len].tolist()
    labels = [tokenizer.piece(token) for token in prompt]
    print(heat_text(s, labels, sys.stdout.isatty()))
    if png:
        figure1(s, labels, png)
    return {"tokens": labels, "saliency": s.tolist()}


def show_figure2(found, name, png):
    """Figure 2: the sparsity after each block, (rows, L), averaged over rows -> a dict."""
    rows, values = len(found), found.mean(0).tolist()
    for block, value in enumerate(values, start=1):
        print(f"block {block:3d}  sparsity {value:.3f}  " + "#" * round(50 * value))
    if png:
        figure2(values, png, f"Sparsity of salient tokens, {name}, {rows} rows")
    return {"rows": rows, "sparsity": values}


def show_arms(model, prompt, runs, schedule, html=None):
    """Both arms' texts, times, FLOPs and bytes, and what was dropped -> a dict.

    prompt: a support.prompts.Prompt; runs: {"full", "sdtp"} of infer.Generation; html: where to
    write the page of survivors.
    """
    ids, expected, tokenizer = prompt
    n, trace = len(ids), runs["sdtp"].trace
    pieces, stage_of = [tokenizer.piece(t) for t in ids], dropped_at(trace, n)
    print(survivors_text(pieces, stage_of, len(trace), sys.stdout.isatty()) + "\n")
    if html:
        survivors_page(html, pieces, stage_of, trace, schedule)
        print(f"wrote {html}")
    longest = max(len(run.tokens) for run in runs.values())
    full = summary(model, runs["full"], tokenizer, longest)
    sdtp = summary(model, runs["sdtp"], tokenizer, longest, schedule)
    print(in_words("full", full) + "\n" + in_words("sdtp", sdtp))
    if expected is not None:
        print(f"right {expected!r}")
    ideal = full["flops"] / sdtp["flops"]
    print(f"\n{n} prompt tokens, {1 - sdtp['counts'][-1] / n:.0%} dropped by the last stage; "
          f"prefill {full['prefill_s'] / sdtp['prefill_s']:.2f}x as fast (ideal by FLOPs "
          f"{ideal:.2f}x), KV cache {1 - sdtp['kv_bytes'] / full['kv_bytes']:.0%} smaller")
    if n < SHORT:
        print(f"{n} prompt tokens are few: pruning pays from some {SHORT} on, and of a short "
              "prompt it may drop what the answer needs")
    return {"prompt_tokens": n, "expected": expected, "stage_of": stage_of, "ideal": ideal,
            "full": full, "sdtp": sdtp}


def summary(model, run, tokenizer, longest, schedule=None):
    """An infer.Generation's text, times, FLOPs (with the schedule's predictors) and bytes.

    What two arms are compared by does not depend on how much each says: caches as the prompt left
    them, and the time of as many tokens as the longest text has.
    """
    said = run.tokens[:-1] if run.tokens[-1] in model.config.eos else run.tokens
    return {"text": tokenizer.decode(said), "counts": run.counts, "prefill_s": run.prefill_s,
            "decode_s": run.decode_s,
            "e2e_s": run.prefill_s + run.decode_s * (longest - 1), "e2e_tokens": longest,
            "flops": flops(model.config, run.counts, schedule=schedule),
            "kv_bytes": run.prompt_kv_bytes, "new_tokens": len(run.tokens)}


def in_words(name, told):
    """A summary in three lines."""
    groups = itertools.groupby(told["counts"])
    counts = ", ".join(f"{n} x{len(list(group))}" for n, group in groups)
    return (f"{name:4}  {told['text']!r}\n"
            f"      prefill {1e3 * told['prefill_s']:.1f} ms, {told['flops'] / 1e9:.2f} GFLOPs; "
            f"decode {1e3 * told['decode_s']:.1f} ms a token; {told['e2e_tokens']} tokens in "
            f"{1e3 * told['e2e_s']:.1f} ms; KV {told['kv_bytes'] / 1e6:.3f} MB\n"
            f"      tokens per block {counts}")
