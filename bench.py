"""Speed and memory, full and SDTP in one run, beside the two floors (Section 4.3, Table 2): `python infer.py --bench`.

Prefill is bound by arithmetic: its floor is FLOPs over the device's measured matmul peak. Decode is bound by bytes: its
floor is the weights and caches that one token reads, over the measured copy bandwidth. Every arm runs in the same loop,
in turn, after a warm-up; `--vs transformers` adds transformers' Llama on the very same weights, dtype and tokens.

Shapes: B = 1 row, N prompt tokens. Times in seconds, sizes in bytes.
"""
import statistics
from pathlib import Path

import torch

from common import hardware, prompt_text, read_rows
from infer import clock, generate, generate_batch
from model import Tokenizer, find, hf_name, need, positions
from prune import drop, flops, kv_bytes, prefill, select


def peak_memory(device, reset=False):
    """Peak bytes since the last call with reset: of the device's allocator on cuda, of the process elsewhere (None where unknown)."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return None


def timed(device, function, repeats):
    """Seconds of each of several calls, after one that is not counted."""
    function()
    found = []
    for _ in range(repeats):
        start = clock(device)
        function()
        found.append(clock(device) - start)
    return found


def ceilings(device, dtype):
    """What the device can do at best, measured: FLOP/s of a large square matmul, bytes/s of a large copy (read and written)."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    source = torch.empty(2 ** (31 if device.type == "cuda" else 28), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size ** 3 / min(timed(device, lambda: a @ b, 10)), 2 * source.numel() / min(timed(device, lambda: target.copy_(source), 10))


def weight_bytes(model):
    """What one decoded token reads of the weights: all blocks and the head; of the embedding a single row."""
    return sum(p.numel() * p.element_size() for part in (model.blocks, model.norm, model.head) for p in part.parameters())


def pruning_seconds(model, tokens, schedule, scorer, repeats):
    """Time of all stages of one prefill, each on its own: the scorer, the selection and the gather of the survivors."""
    n, total = tokens.shape[1], 0.0
    x, pos = model.embed(tokens), positions(tokens)
    for stage in range(len(schedule.after(len(model.blocks)))):
        k = schedule.kept(n, stage + 1)
        run = lambda: drop(x, pos, select(scorer(stage, x, pos), pos, k, n, schedule.sink, schedule.local))
        total += statistics.median(timed(model.device, run, repeats))
        x, pos = run()
    return total


def as_transformers(model):
    """The same weights (shared, not copied) as transformers' Llama with SDPA. Raises ImportError or ValueError where that cannot be."""
    try:
        import transformers
    except ImportError:
        raise ImportError("--vs transformers needs it: pip install transformers") from None
    c = model.config
    need(not c.qkv_bias and not c.window, "--vs transformers: biases on q, k and v, and sliding windows, are not compared")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = {"rope_type": "llama3", **dict(zip(names, c.rope_llama3))} if c.rope_llama3 else None
    if int(transformers.__version__.split(".")[0]) < 5:
        rope = {"rope_theta": c.rope_theta, "rope_scaling": scaling}
    else:
        rope = {"rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": c.rope_theta}}
    config = transformers.LlamaConfig(
        hidden_size=c.dim, intermediate_size=c.ffn, num_hidden_layers=c.n_blocks, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
        vocab_size=c.vocab, rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_positions, tie_word_embeddings=c.tied, attn_implementation="sdpa", **rope)
    with torch.device(model.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(model.dtype)
        try:
            theirs = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(default)
    theirs.load_state_dict({hf_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}, assign=True)
    return theirs


@torch.no_grad()
def run_transformers(theirs, tokens, new):
    """Prefill and greedy decode -> first logits (1, V), seconds of prefill, seconds a further token."""
    start = clock(tokens.device)
    out = theirs(tokens, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    token[0].item()
    first, logits = clock(tokens.device), out.logits[:, -1]
    for _ in range(new - 1):
        out = theirs(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        token[0].item()
    return logits, first - start, (clock(tokens.device) - first) / max(1, new - 1)


def bench(model, lengths, schedule, scorer, new=128, repeats=5, vs=None, static=False):
    """Table 2 -> one dict a prompt length. `vs`: "transformers" for a third arm, as it comes, not compiled; `static`: decode in
    fixed shapes, recording the step not counted. FLOPs and floors of the SDTP arm are those of the predictors, whatever scorer runs."""
    rows, L, c = [], len(model.blocks), model.config
    theirs = as_transformers(model) if vs else None
    peak, bandwidth = ceilings(model.device, model.dtype)
    print(f"{hardware(model.device)}, {str(model.dtype).removeprefix('torch.')}; measured ceilings: matmul {peak / 1e12:.3g} TFLOP/s, copy {bandwidth / 1e9:.3g} GB/s\n"
          f"{new} new tokens; every time the median of {repeats} in turn with the other arms (prefill), of {min(3, repeats)} (decode)\n"
          "      N  arm            prefill s (min to max)      TFLOP/s  of peak   decode ms   GB/s  of copy   end to end s   peak GB    KV GB   prefill speed-up of ideal   end to end, by the floors")
    for n in lengths:
        tokens = torch.randint(0, c.vocab, (1, n), generator=torch.Generator().manual_seed(n)).to(model.device)
        counts = {"full": [n] * L, "sdtp": schedule.counts(n, L), **({"transformers": [n] * L} if vs else {})}
        arms = {"full": (None, None), "sdtp": (schedule, scorer)}
        prefills, decodes, row = {arm: [] for arm in counts}, {arm: [] for arm in counts}, {"n": n, "peak_flops": peak, "copy_bytes_s": bandwidth}

        def once(name, tokens_to_make):
            if name == "transformers":
                return run_transformers(theirs, tokens, tokens_to_make)[1:]
            found = generate(model, tokens, tokens_to_make, *arms[name], eos=(), static=static)
            return found.prefill_s, found.decode_s

        for name in 2 * list(counts):                                # warm-up, twice: the second finds what the first made compile anew
            once(name, min(new, 4))
        for i in range(repeats):
            for name in list(counts)[::1 - 2 * (i % 2)]:             # there and back: nobody always follows the same arm
                long = i >= repeats - min(3, repeats)                # the last runs also decode
                if i == repeats - 1:
                    peak_memory(model.device, reset=True)
                prefill_s, decode_s = once(name, new if long else 1)
                prefills[name].append(prefill_s)
                decodes[name] += [decode_s] * long
                if i == repeats - 1:
                    row[name] = {"peak_bytes": peak_memory(model.device)}
        floor = {}
        for name in counts:
            used = flops(c, counts[name], schedule=schedule if name == "sdtp" else None)
            moved = weight_bytes(model) + kv_bytes(c, [m + new // 2 for m in counts[name]], model.embed.weight.element_size())
            floor[name] = used / peak + (new - 1) * moved / bandwidth
            prefill_s, decode_s = statistics.median(prefills[name]), statistics.median(decodes[name]) if new > 1 else 0.0
            row[name] |= {"prefill_s": prefill_s, "prefill_spread_s": [min(prefills[name]), max(prefills[name])], "decode_s": decode_s, "decode_spread_s": [min(decodes[name]), max(decodes[name])],
                          "e2e_s": prefill_s + decode_s * (new - 1), "kv_bytes": kv_bytes(c, [m + new - 1 for m in counts[name]], model.embed.weight.element_size()), "flops": used,
                          "flops_s": used / prefill_s, "of_peak": used / prefill_s / peak, "bytes_s": moved / decode_s if new > 1 else 0.0, "of_copy": moved / decode_s / bandwidth if new > 1 else 0.0}
        full, sdtp = row["full"], row["sdtp"]
        row["ideal"] = full["flops"] / sdtp["flops"]
        row["speedup"] = {"prefill": full["prefill_s"] / sdtp["prefill_s"], "e2e": full["e2e_s"] / sdtp["e2e_s"], "e2e_by_floors": floor["full"] / floor["sdtp"]}
        row["share_of_ideal"] = row["speedup"]["prefill"] / row["ideal"]
        row["pruning_s"] = pruning_seconds(model, tokens, schedule, scorer, repeats)
        row["pruning_share"] = row["pruning_s"] / sdtp["prefill_s"]
        if vs:
            ours, other = prefill(model, tokens)[0], run_transformers(theirs, tokens, 1)[0]
            row["vs"] = {"prefill": row["transformers"]["prefill_s"] / full["prefill_s"], "decode": row["transformers"]["decode_s"] / full["decode_s"] if new > 1 else 0.0, "logits_differ_by": (ours - other).abs().max().item()}
        for name in counts:
            r = row[name]
            print(f"{n:7d}  {name:12} {r['prefill_s']:10.3f} ({r['prefill_spread_s'][0]:.3f} to {r['prefill_spread_s'][1]:.3f}) {r['flops_s'] / 1e12:9.3g} {r['of_peak']:8.0%} {1e3 * r['decode_s']:11.2f} {r['bytes_s'] / 1e9:6.3g} {r['of_copy']:8.0%}"
                  f" {r['e2e_s']:14.3f} {(r['peak_bytes'] or 0) / 1e9:9.2f} {r['kv_bytes'] / 1e9:8.3f}"
                  + (f" {row['speedup']['prefill']:12.2f}x of {row['ideal']:.2f}x = {row['share_of_ideal']:4.0%} {row['speedup']['e2e']:12.2f}x, {row['speedup']['e2e_by_floors']:.2f}x   stages {row['pruning_share']:.1%} of prefill" if name == "sdtp" else "")
                  + (f"   full is {row['vs']['prefill']:.2f}x as fast in prefill, {row['vs']['decode']:.2f}x in decode; logits differ by {row['vs']['logits_differ_by']:.1g}" if name == "transformers" else ""), flush=True)
        rows.append(row)
    return rows


def profile(model, n, schedule, scorer, top=12):
    """Where a prefill's time goes: {arm: [(operator, share of its time)]}, operators by the time spent in themselves."""
    from torch.profiler import ProfilerActivity, profile as profiler
    tokens = torch.randint(0, model.config.vocab, (1, n), generator=torch.Generator().manual_seed(n)).to(model.device)
    cuda, found = model.device.type == "cuda", {}
    for name, arm in (("full", (None, None)), ("sdtp", (schedule, scorer))):
        prefill(model, tokens, *arm)
        with profiler(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as seen:
            prefill(model, tokens, *arm)
            clock(model.device)
        spent = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in seen.key_averages()
                 if e.device_type == torch.autograd.DeviceType.CPU}           # an operator, not once more its kernel
        total = sum(spent.values())
        found[name] = [(key, time / total) for key, time in sorted(spent.items(), key=lambda kv: -kv[1])[:top]]
        print(f"{name}, {n} tokens: " + ", ".join(f"{key.removeprefix('aten::')} {share:.1%}" for key, share in found[name]), flush=True)
    return found


def batch(args, model, schedule, scorer, metadata):
    """The first rows of the data in one batch, under both arms: texts and tokens a second."""
    tokenizer, found = Tokenizer(args.ckpt), []
    rows = read_rows(args.data or find(args.ckpt) / "train.jsonl", "heldout")[:args.batch]
    prompts = [tokenizer.encode(prompt_text(row, args.template or metadata.get("template", "plain"))) for row in rows]
    need(rows, "no held-out row to read: name a file with --data")
    print(f"{len(rows)} rows in one batch, prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens")
    for name, arm in (("full", (None, None)), ("sdtp", (schedule, scorer))):
        generate_batch(model, prompts, 2, *arm)                      # a warm-up
        start = clock(model.device)
        new = generate_batch(model, prompts, args.max_new_tokens or 48, *arm)
        seconds = clock(model.device) - start
        found.append({"arm": name, "seconds": seconds, "texts": [tokenizer.decode([t for t in row if t not in model.config.eos]) for row in new]})
        print(f"\n{name}: {seconds:.2f} s, {sum(map(len, prompts + new)) / seconds:.0f} tokens/s")
        for row, text in zip(rows, found[-1]["texts"]):
            print(f"  {text!r}   right {row['response']!r}")
    return found
