"""Table 2 measured, beside what the device can do (Section 4.3), and beside other engines.

Prefill is bound by arithmetic: its floor is FLOPs over the measured peak of a matmul. Decode is
bound by bytes: its floor is the weights and caches that one token reads, over the pace at which a
large matrix-vector product reads its matrix. The arms are those of `infer.py --bench` and take
turns in the same way. Other engines read the same tokens on as many threads, in the same turns:
transformers our own tensors, llama.cpp a GGUF file of the same model, written anew in three types.

    python -m lab.speed --ckpt smollm2 --lengths 512 1024 --vs transformers
    python -m lab.speed --ckpt smollm2 --lengths 512 1024 --vs llama.cpp SmolLM2.gguf

Shapes: N prompt tokens, n of a pass, V vocabulary.
"""
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from infer import generate
from prune import UNPRUNED, flops_row, load_pruning, predictor_scorer, prefill
from support import options, runs
from support.config import hf_config
from support.files import need
from support.weights import compile_blocks, hf_name, linear

# --------------------------------------------------------------------------------- what is measured


def timed(device, function, repeats):
    """Seconds of each of several calls, after one that is not counted."""
    function()
    found = []
    for _ in range(repeats):
        start = runs.clock(device)
        function()
        found.append(runs.clock(device) - start)
    return found


def ceilings(device, dtype):
    """FLOP/s of a large matmul; bytes/s that a large matrix-vector product reads."""
    matrix = torch.randn(8192, 8192, device=device).to(dtype)
    rows = matrix if device.type == "cuda" else matrix[:1024]
    matmul_s = min(timed(device, lambda: linear(rows, rows), 10))
    read_s = min(timed(device, lambda: linear(rows[:1], matrix), 20))
    return 2 * len(rows)**2 * 8192 / matmul_s, matrix.nbytes / read_s


class Engine:
    """Another engine in the shape of our model: all of it, with its own caches, is the one block
    that infer.generate sees. So all arms are picked from, checked and timed by the same code.
    """
    c = None                        # what prune.prefill asks of a model and of a block
    check_positions = rope = lambda *given: None

    def __init__(self, model):
        self.device, self.dtype, self.blocks = model.device, model.dtype, [self]

    def embed(self, x):
        return x

    logits = embed


class Transformers(Engine):
    """transformers' model with SDPA on our weights, shared and not copied."""

    def __init__(self, model):
        super().__init__(model)
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError:
            raise ImportError("--vs transformers needs it: pip install transformers") from None
        config = AutoConfig.for_model(**hf_config(model.config))
        with torch.device("meta"):              # shapes without memory
            theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        with model.device:                      # its angles are no weights
            theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
        state = {hf_name(name): p for name, p in model.named_parameters()}
        state.setdefault("lm_head.weight", model.embed.weight)      # where it is tied
        theirs.requires_grad_(False).load_state_dict(state, assign=True)
        self.theirs = theirs.eval()

    def __call__(self, tokens, rope, held):
        """tokens (1, n) -> the last one's logits (1, 1, V); held: {} or its earlier caches."""
        out = self.theirs(tokens, **held, use_cache=True, logits_to_keep=1)
        held["past_key_values"] = out.past_key_values
        return out.logits


class LlamaCpp(Engine):
    """llama.cpp, by the package llama-cpp-python: a GGUF file, and room for `longest` tokens."""

    def __init__(self, model, file, longest):
        super().__init__(model)
        try:
            import llama_cpp
        except ImportError:
            raise ImportError("--vs llama.cpp needs it: pip install llama-cpp-python") from None
        threads = torch.get_num_threads()
        self.lib, self.V = llama_cpp, model.config.vocab
        self.theirs = llama_cpp.Llama(str(file), n_ctx=longest, n_threads=threads, verbose=False,
                                      n_threads_batch=threads)

    def __call__(self, tokens, rope, held):
        """As of Transformers; its caches are its own, and a new prompt forgets them."""
        if not held:
            self.theirs.reset()
        held["begun"] = True
        self.theirs.eval(tokens[0].tolist())
        found = self.lib.llama_get_logits_ith(self.theirs.ctx, -1)
        return torch.tensor(found[:self.V])[None, None]

    def build(self):
        """How it was built: the processor's features that it uses."""
        return self.lib.llama_print_system_info().decode().strip()


def retyped(file, kind, out):
    """Write a GGUF file anew with all matrices in one type ("F32", "BF16", "Q8_0") -> out."""
    import gguf
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        wanted = gguf.GGMLQuantizationType[kind if data.ndim > 1 else "F32"]
        writer.add_tensor(tensor.name, gguf.quants.quantize(data, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def engines(args, model):
    """The arms that --vs asks for, {name: (engine, schedule, scorer, kind of cache)}."""
    if not args.vs:
        return {}
    if args.vs == ["transformers"]:
        found = {"transformers": Transformers(model)}
    else:
        need(args.vs[:1] == ["llama.cpp"] and len(args.vs) == 2,
             "--vs: expected transformers, or llama.cpp and a GGUF file of this checkpoint")
        longest, folder = max(args.lengths) + args.max_new_tokens, Path("out", "gguf")
        folder.mkdir(parents=True, exist_ok=True)
        found = {f"llamacpp_{kind}": LlamaCpp(model, retyped(
            args.vs[1], kind, folder / f"{Path(args.vs[1]).stem}-{kind}.gguf"), longest)
            for kind in ("F32", "BF16", "Q8_0")}
        print(f"llama.cpp: {found['llamacpp_F32'].build()}", flush=True)
    return {name: (engine, UNPRUNED, None, their_caches) for name, engine in found.items()}


def their_caches(*given):
    """The kind of cache, see infer.generate, that an Engine keeps its own in."""
    return SimpleNamespace(attend={})


def measure(tokens, arms, new, repeats, best, progress):
    """A row of Table 2, a dict, for a prompt (1, N): times, and what they reach of the device.

    arms: {name: (model, schedule, scorer, ...)}, as infer.generate takes them; they take turns.
    best: what `ceilings` says. The floor of a decoded token reads the blocks, the head, as large as
    the embedding, and the prompt's caches: floors_s are those of prefill, token and the whole.
    "vs" says for each further arm how many times as fast the full one is.
    """
    N, (peak, pace), (model, schedule, _) = tokens.shape[1], best, arms["sdtp"]
    calls = {name: partial(generate, net, tokens, new, *how, eos=())
             for name, (net, *how) in arms.items()}
    times = runs.take_turns(calls, repeats, progress)
    costs = flops_row(model.config, schedule, N)        # its caches have 2 bytes a value
    full, sdtp = ({"flops": flops, "kv_bytes": size * model.dtype.itemsize // 2}
                  for flops, size in zip(costs["exact"], costs["kv_bytes"]))
    row = runs.table_row(N, new, times, {name: sdtp if name == "sdtp" else full for name in arms})
    weights = sum(p.nbytes for p in [model.embed.weight, *model.blocks.parameters()])
    for name in arms:
        arm = row[name]
        prefill_s, decode_s = arm["flops"] / peak, (weights + arm["kv_bytes"]) / pace
        arm["floors_s"] = [prefill_s, decode_s, prefill_s + (new - 1) * decode_s]
    row["speedup"]["e2e_by_floors"] = row["full"]["floors_s"][2] / row["sdtp"]["floors_s"][2]
    ours, full, row["vs"] = prefill(model, tokens)[0], row["full"], {}
    for name in arms.keys() - {"full", "sdtp"}:
        theirs = arms[name][0](tokens, None, {})[0]
        row["vs"][name] = {"prefill": row[name]["prefill_s"] / full["prefill_s"],
                           "decode": row[name]["decode_s"] / full["decode_s"],
                           "logits_differ_by": (ours - theirs).abs().max().item()}
    return row


# ------------------------------------------------------------------------------------ command line

ARM = ("{n:7d}  {name:14} {prefill_s:10.3f} ({prefill_spread_s[0]:.3f} to "
       "{prefill_spread_s[1]:.3f}) {floors_s[0]:9.3f} {decode_s:10.4f} {floors_s[1]:8.4f}")
GAIN = ("         sdtp: prefill {speedup[prefill]:.2f}x of {ideal:.2f}x = {share_of_ideal:.0%}; "
        "end to end {speedup[e2e]:.2f}x, by the floors {speedup[e2e_by_floors]:.2f}x")
VS = ("         full beside {name}: prefill {prefill:.2f}x as fast, decode {decode:.2f}x; "
      "logits differ by {logits_differ_by:.1g}")


def main():
    parser = options.command_parser(__doc__)
    options.add_pruning_options(parser)
    parser.add_argument("--lengths", type=options.at_least(1), nargs="+", default=[512, 1024],
                        help="prompt lengths (default: 512 1024)")
    parser.add_argument("--max-new-tokens", type=options.at_least(2), default=128)
    parser.add_argument("--repeats", type=options.at_least(1), default=5,
                        help="timed runs of each arm")
    parser.add_argument("--vs", nargs="+", metavar="ENGINE", help="other engines in the same run: "
                        "transformers, or llama.cpp and a GGUF file of the same model")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    args, rows = parser.parse_args(), []
    options.check_predictors(args)
    model, schedule, predictors = load_pruning(args)
    model.check_positions(max(args.lengths) + args.max_new_tokens - 1)
    arms = {"full": (model, UNPRUNED, None),
            "sdtp": (model, schedule, predictor_scorer(predictors))}
    arms |= engines(args, model)
    if args.compile:
        compile_blocks(model.blocks)
    best = ceilings(model.device, model.dtype)
    print(f"{options.hardware(model.device)}, {model.dtype}; ceilings: {best[0]:.3g} FLOP/s, "
          f"{best[1]:.3g} bytes/s\n{args.max_new_tokens} new tokens; medians, arms in turn\n"
          "      N  arm               prefill s (min to max)       floor   decode s    floor")
    for N in args.lengths:
        tokens = runs.random_prompt(model.config.vocab, N).to(model.device)
        row = measure(tokens, arms, args.max_new_tokens, args.repeats, best,
                      runs.Progress(quiet=args.quiet))
        for name in arms:
            print(ARM.format(n=N, name=name, **row[name]))
        print(GAIN.format(**row), flush=True)
        for name, told in row["vs"].items():
            print(VS.format(name=name, **told), flush=True)
        rows.append(row)
    options.print_json(args, model, {"schedule": asdict(schedule), "ceilings": best, "bench": rows})


if __name__ == "__main__":
    options.cli(main)
