"""The command lines of all commands: options, one-line errors, and where a number comes from.

Each command's options are read, and what cannot work is refused, before any weights are read.
"""
import argparse
import contextlib
import difflib
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from support.chat import chat_notes, choose_chat, render
from support.config import SHAPES
from support.files import blame, need, read_json, writable
from support.processes import alone, rank
from support.rows import encode_row, examples, read_rows, rows_at_hand
from support.runs import find_predictors, weights_key
from support.weights import DTYPES, ROOT, describe, find

DEMO = ROOT / "support" / "demo.json"       # a page of ours and questions about it


# ------------------------------------------------------------------------------------- the parts


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the name that was perhaps meant."""

    def error(self, message):
        word = message.removeprefix("unrecognized arguments: ").split()[0]
        near = difflib.get_close_matches(word, self._option_string_actions, 1)
        raise ValueError(message + (f"; do you mean {near[0]}?" if near else "; see --help"))


def command_parser(doc):
    """A Parser whose --help begins with a module's docstring, as it is laid out there."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiet", action="store_true", help="say nothing of how far the work is")
    parser.add_argument("--json", action="store_true", help="print all that was measured as one "
                        "JSON object and nothing else; the text goes to stderr")
    return parser


def at_least(minimum):
    """For argparse: a whole number not below the minimum."""
    def whole(text):
        if not text.isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"expected a whole number, at least {minimum}, not {text!r}")
        return int(text)
    return whole


def refuse_idle(parser, args, where, names):
    """Refuse options, a text of their names, that were given but do nothing where the run is."""
    for name in names.split():
        need(getattr(args, name) == parser.get_default(name),
             f"--{name.replace('_', '-')} does nothing {where}: leave it out")


def picture_file(text):
    """For argparse: where a picture goes; that it can be drawn is known before the work begins."""
    if not importlib.util.find_spec("matplotlib"):
        raise ImportError("pictures need the optional package matplotlib: pip install matplotlib")
    return writable(text)


def tokens_or_question(text):
    """For argparse: a number of tokens, or the word."""
    return text if text == "question" else int(text)


SCHEDULE_HELP = {   # name: type, meaning, the paper's value for 32 blocks
    "first": (int, "the first stage stands after this block", 4),
    "step": (int, "blocks between stages", 3),
    "stages": (int, "number of stages", 10),
    "keep": (float, "stage s keeps keep^s of the prompt", 0.9),
    "sink": (int, "first tokens always kept; in infer.py also question: all of a question that "
             "stands first, which is a promise, not a gain (docs/results.md)", 4),
    "local": (float, "share of last tokens always kept", 0.1),
}


def add_schedule_options(parser, sink=int):
    """The options of a prune.Schedule; sink: the type of --sink."""
    for name, (kind, meaning, paper) in SCHEDULE_HELP.items():
        kind = sink if name == "sink" else kind
        parser.add_argument(f"--{name}", type=kind, help=f"{meaning} (paper, 32 blocks: {paper})")


def schedule_options(args):
    """The fields of a Schedule that were given on the command line, a dict."""
    given = {name: getattr(args, name, None) for name in SCHEDULE_HELP}
    return {name: value for name, value in given.items() if value is not None}


def add_model_options(parser):
    """Which model, where."""
    parser.add_argument("--ckpt", default="toy", help="checkpoint directory, as given or under "
                        "checkpoints/")
    parser.add_argument("--device", help="cuda, cpu or mps (default: cuda if there)")
    parser.add_argument("--dtype", choices=sorted(DTYPES),
                        help="default: bfloat16 on cuda, else float32")


def add_chat_options(parser):
    """What stands around a user's text; see support.chat.choose_chat."""
    parser.add_argument("--template", metavar="NAME", help="prompt template: own (the "
                        "checkpoint's), plain, chatml or a .jinja file (default: the predictors', "
                        "where they are used, else the checkpoint's own)")
    parser.add_argument("--system", metavar="TEXT", help="the prompt's system text")


def add_data_options(parser, limit, max_response=96):
    """Which rows; the two are defaults, None for none."""
    parser.add_argument("--data", help="JSONL with instruction, context, response (default: the "
                        "toy's own rows; databricks-dolly-15k.jsonl where it lies)")
    add_chat_options(parser)
    parser.add_argument("--context", action="store_true", help="only rows that have a context")
    parser.add_argument("--question", choices=("first", "last", "both"), default="first",
                        help="where the instruction stands: before the context, after it, or both")
    parser.add_argument("--min-prompt", type=at_least(1), default=1,
                        help="shortest prompt, in tokens")
    parser.add_argument("--max-prompt", type=at_least(1), default=2048,
                        help="longest prompt, in tokens")
    parser.add_argument("--max-response", type=at_least(1), default=max_response,
                        help="responses are cut to this many tokens (default: "
                             f"{max_response or 'not at all'})")
    parser.add_argument("--limit", type=at_least(1), default=limit, help="at most this many rows")


def add_pruning_options(parser, sink=int):
    """Which model prunes by what; prune.load_pruning reads them."""
    add_model_options(parser)
    parser.add_argument("--predictors", help="predictors, a file or its folder (default: those "
                        "trained here, out/NAME, else those in the checkpoint directory)")
    add_schedule_options(parser, sink)


# ---------------------------------------------------------------------------------- the commands


def saliency_options(doc, reductions):
    parser = command_parser(doc)
    add_model_options(parser)
    add_data_options(parser, limit=20)
    parser.add_argument("--figure", type=int, choices=(1, 2), default=1,
                        help="1: heat map of one row; 2: sparsity per block over rows")
    parser.add_argument("--reduce", choices=reductions, default="norm_gx",
                        help="how the gradient becomes one number per token")
    parser.add_argument("--row", type=at_least(0), default=0,
                        help="Figure 1: which of the held-out rows")
    parser.add_argument("--prompt", help="Figure 1: this prompt instead of a row (with --response)")
    parser.add_argument("--response",
                        help="Figure 1: the answer whose log-likelihood is traced back")
    parser.add_argument("--png", type=picture_file,
                        help="write the figure here (needs matplotlib)")
    args = parser.parse_args()
    idle = {1: "limit", 2: "row prompt response"}[args.figure]
    refuse_idle(parser, args, f"with --figure {args.figure}", idle)
    if args.prompt is not None:
        refuse_idle(parser, args, "with --prompt",
                    "data row context question min_prompt max_prompt")
    return args


def prune_options(doc):
    parser = command_parser(doc)
    parser.add_argument("--shape", default="mistral-7b",
                        help=f"{', '.join(SHAPES)}, or a checkpoint directory (its config.json)")
    parser.add_argument("--lengths", dest="sizes", type=at_least(1), nargs="+", metavar="N",
                        help="prompt lengths",
                        default=[4096, 8192, 16384, 32768, 65536, 131072])
    add_schedule_options(parser)
    return parser.parse_args()


RECIPE = {      # the fields of a train.Recipe: type or choices, meaning
    "cls": (float, "weight of the pruned model's cross entropy, Eq. 7"),
    "mse": (float, "weight of the MSE to the saliency, Eq. 4"),
    "rank": (float, "weight of the ranking loss, Eq. 5 and 6"),
    "distill": (float, "weight of the KL divergence from the unpruned model"),
    "reduce": (("norm_gx", "norm_g", "abs_dot"), "how the gradient becomes one number per token"),
    "mask": (("gumbel", "topk"), "gumbel: sample each token (paper; nothing then ties the number "
             "kept to the schedule); topk: keep the scheduled count, as inference does"),
    "tau": (float, "temperature of the Gumbel-Softmax"),
    "pairs": (("equal", "saliency"), "beyond the paper: saliency weighs each pair of the ranking "
              "loss by how far its saliencies lie apart"),
    "states": (("pruned", "marked"), "what the predictors read for MSE and ranking: the states of "
               "the pruning pass (paper) or of the marking pass; with marked and neither --cls "
               "nor --distill there is no pruning pass, which is twice as fast"),
    "near": (bool, "beyond the paper: the predictors also read the mean state around a token (with "
             "--states marked)"),
    "around": (float, "beyond the paper: share of a token's saliency that is the mean of the 65 "
               "tokens around it"),
    "lr": (float, "peak learning rate of AdamW"),
    "warmup": (float, "share of the steps with a rising rate; a cosine follows"),
    "accum": (at_least(1), "rows whose gradients are added up in a step"),
    "seed": (at_least(0), "of the predictors' first weights, the rows' order and the noise"),
}


def train_options(doc, defaults):
    """defaults: {field of train.Recipe: value}."""
    parser = command_parser(doc)
    add_model_options(parser)
    add_data_options(parser, limit=None, max_response=None)
    for name, (kind, meaning) in RECIPE.items():
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true", help=meaning)
            continue
        kind = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        parser.add_argument(f"--{name}", default=defaults[name], help=meaning, **kind)
    parser.add_argument("--epochs", type=at_least(1),
                        help="passes over the rows (default: 2, the paper's; toy: 1)")
    parser.add_argument("--steps", type=at_least(1), help="optimiser steps, instead of --epochs")
    parser.add_argument("--hold", action="store_true", help="keep every row's marking pass in "
                        "memory (S x P values a row, with --states marked S x P x D)")
    parser.add_argument("--out", help="where predictors.safetensors goes (default: out/NAME/, "
                        "where the other commands look first)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true",
                       help="go on from the state beside --out (from the start if there is none)")
    again.add_argument("--restart", action="store_true",
                       help="begin anew, though a run that was stopped left its state there")
    parser.add_argument("--save-every", type=float, default=120, help="seconds between saves")
    parser.add_argument("--report-every", type=at_least(1), default=50,
                        help="steps between held-out reports")
    parser.add_argument("--report-rows", type=at_least(0), default=16,
                        help="held-out rows in a report (0: none)")
    parser.add_argument("--shard", action="store_true", help="under torchrun: spread the frozen "
                        "blocks over the devices (FSDP2), for a backbone too large for one")
    parser.add_argument("--png", type=picture_file, help="draw the training curve")
    add_schedule_options(parser)
    args = parser.parse_args()
    check_training(args, int(os.environ.get("WORLD_SIZE", 1)))
    if args.mask != "gumbel":
        refuse_idle(parser, args, "without --mask gumbel", "tau")
    if args.states == "marked" and not args.cls and not args.distill:
        refuse_idle(parser, args, "without a pruning pass", "mask tau")
    if not args.report_rows:
        refuse_idle(parser, args, "without rows to report", "report_every")
    return args


def check_training(args, processes):
    """Refuse what can only do harm, or nothing, before anything is read."""
    weights = args.cls, args.mse, args.rank, args.distill
    need(any(weights) and min(weights) >= 0, "weights of losses are not negative, one at least is "
                                             "positive")
    need(0 < args.lr < 10 and args.tau > 0 and 0 <= args.warmup < 1 and 0 <= args.around <= 1,
         "--lr and --tau are positive, --warmup and --around shares")
    need(not (args.steps and args.epochs), "--steps and --epochs each say how long to train: "
                                           "leave out one")
    need(not (args.hold and args.shard), "--shard gathers blocks in step on all processes, so "
                                         "none may pass over a row: leave out --hold")
    need(processes > 1 or not args.shard, "--shard needs several processes: put torchrun "
                                          "--nproc-per-node N before the command")
    need(args.accum % processes == 0,
         f"--accum {args.accum} rows a step do not divide among {processes} processes")


def recipe_options(args, n_rows):
    """The fields of a train.Recipe for so many rows, a dict."""
    own = args.ckpt == "toy" and not args.data      # once is enough
    epochs = args.epochs or (1 if own else 2)
    steps = args.steps or max(1, epochs * n_rows // args.accum)
    return {name: getattr(args, name) for name in RECIPE} | {"steps": steps}


def infer_options(doc):
    parser = command_parser(doc)
    add_pruning_options(parser, tokens_or_question)
    parser.add_argument("--prompt", help="the user's text (default: a page of the checkpoint, or "
                        "of ours, with questions about it)")
    parser.add_argument("--prompt-file", help="the user's text, from a file; - reads stdin")
    parser.add_argument("--data", help="take the prompt from a row of this JSONL")
    parser.add_argument("--row", type=at_least(0), default=0,
                        help="which held-out row of --data")
    parser.add_argument("--ask", metavar="TEXT", action="append", help="a question about the text; "
                        "several are asked one after the other of what was read once")
    parser.add_argument("--question", choices=("first", "last", "both"), help="where a question "
                        "stands: before the text, so that it is pruned for this question, behind "
                        "it, or both (default: both; of several: last)")
    add_chat_options(parser)
    parser.add_argument("--left", type=float, metavar="SHARE", help="what the last stage leaves of "
                        "the prompt: a share, or a number of tokens (default: by --keep)")
    parser.add_argument("--max-new-tokens", type=at_least(1),
                        help="default: 48, with --bench 128, or as many as fit")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--html", metavar="FILE", type=writable,
                        help="write the survivors as a self-contained page")
    parser.add_argument("--bench", type=at_least(1), nargs="+", metavar="N",
                        help="print Table 2's rows for these prompt lengths")
    parser.add_argument("--repeats", type=at_least(1), help="timed runs of each arm (default: 5; a "
                        "prompt whose prefill takes over 2 s is timed while it is answered)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tp", action="store_true", help="under torchrun: divide every block's "
                        "heads and SwiGLU among the processes (tensor parallel)")
    args = parser.parse_args()
    check_inference(parser, args)
    return args


def check_inference(parser, args):
    """Refuse what cannot work, or does nothing, before anything is read."""
    need(args.bench or not args.ckpt.startswith("random:"),
         "random weights have nothing to say: use --bench")
    if args.bench:
        need(args.sink != "question", "--sink question is for a question, not for --bench")
        refuse_idle(parser, args, "with --bench, which reads random tokens greedily",
                    "prompt prompt_file data row ask question template system temperature seed "
                    "html")
    elif not args.data:
        refuse_idle(parser, args, "without --data", "row")
    if args.left is not None:
        need(0 < args.left <= 1 or args.left.is_integer() and args.left > 0,
             f"--left {args.left}: expected a share, or a whole number of tokens")
        need(args.left <= 1 or len(args.bench or [0]) == 1, "--left TOKENS is for one length")
        refuse_idle(parser, args, "beside --left", "keep")
    check_tp(args)
    check_predictors(args)


def check_tp(args):
    """Tensor parallel needs several processes, and they need it."""
    need(alone() != args.tp, "--tp and torchrun --nproc-per-node N belong together: neither is of "
                             "use without the other")


def check_predictors(args):
    """Refuse a checkpoint that nothing was trained for."""
    need(args.ckpt.startswith("random:") or find_predictors(args)[0],
         f"{args.ckpt} has no predictors yet: `{beside('train.py', '--ckpt', args.ckpt)}` trains "
         "them (or name a file with --predictors)")


# ------------------------------------------------------------------------------ prompts and rows


class Question(NamedTuple):
    text: str
    ids: list                       # token ids that follow the prompt; [] where it stands in there
    expected: Optional[str]         # the right answer, where it is known


class Prompt(NamedTuple):
    ids: list                       # token ids that are read, and pruned, once
    questions: list                 # of Question, each answered behind the prompt
    tokenizer: Any


def read_prompt(args, tokenizer):
    """The prompt that infer.py's options ask for -> Prompt; says which files are used."""
    file, metadata = find_predictors(args)
    chat = choose_chat(find(args.ckpt), args.template, args.system, metadata)
    text, asked, before = text_and_questions(args)
    need(text.strip(), "the prompt is empty")
    print(f"model {find(args.ckpt)}; {in_words(file, metadata, chat)}", flush=True)
    (question, expected), *more = asked or [("", None)]
    place = args.question or ("last" if more else "both")
    need(args.sink != "question" or question and place != "last",
         "--sink question is for a question that stands first: --ask one, with --question both")
    if question and place == "last":
        return read_once(tokenizer, chat, text, asked, before)
    need(not more, "several questions are asked last, of a text that is read once: leave out "
                   f"--question {place}")
    if question or expected is not None:
        row = {"instruction": question or text, "context": text * bool(question), "response": "",
               "before": before}
        ids, *others = (encode_row(tokenizer, row | part, chat, None, place).tokens.tolist()
                        for part in ({}, {"context": "0"}, {"context": "x"}))
        if args.sink == "question":     # what stands before any context
            args.sink = len(commonprefix(others))
    else:
        ids = tokenizer.encode(render(chat, text), chat.bos)
    return Prompt(ids, [Question(question, [], expected)], tokenizer)


def text_and_questions(args):
    """-> a text; its questions, each with the right answer or None; earlier turns of a chat.

    Without any it is a page of the checkpoint, or of ours, with questions about it.
    """
    sources = args.prompt, args.prompt_file, args.data
    need(sources.count(None) > 1,
         "--prompt, --prompt-file and --data each say what to read: leave all but one out")
    asked = [(question.strip(), None) for question in args.ask or ()]
    if args.prompt is not None:
        return args.prompt, asked, ()
    if args.prompt_file is not None:
        return read_text(args.prompt_file), asked, ()
    if args.data is None:
        own = find(args.ckpt) / DEMO.name
        page = read_json(own if own.is_file() else DEMO)
        return page["text"], asked or page["questions"], ()
    rows = read_rows(args.data, "heldout")
    need(args.row < len(rows), f"--row {args.row}: {args.data} has {len(rows)} held-out rows")
    row = rows[args.row]
    text, question = row.get("context"), row["instruction"]
    if not text:
        text, question = question, ""
    return text, asked or [(question, row["response"])], row.get("before", ())


def read_once(tokenizer, chat, text, asked, before):
    """A text to be read once, and what follows it for each question -> Prompt."""
    prompts = [render(chat, f"{text}\n\n{question}", before) for question, _ in asked]
    heads = {prompt.rpartition(question)[0].rstrip()
             for prompt, (question, _) in zip(prompts, asked)}
    head = heads.pop()
    need(head and not heads, f"{chat.file}: the chat template does not put a question last")
    questions = [Question(question, tokenizer.encode(prompt[len(head):], bos=False), expected)
                 for prompt, (question, expected) in zip(prompts, asked)]
    return Prompt(tokenizer.encode(head, chat.bos), questions, tokenizer)


def in_words(file, metadata, chat):
    """Which predictors and which template are used, and who says so."""
    why = f" ({metadata['why']})" if metadata.get("why") else ""
    return f"predictors {file}{why}; template {chat.name} ({chat.why})"


def read_text(path):
    """The text of a prompt file, UTF-8 with or without a byte-order mark; "-" is stdin."""
    if path == "-":
        return sys.stdin.read()
    need(Path(path).is_file(), f"{path}: no such prompt file")
    with blame(path, "not UTF-8 text"):
        return Path(path).read_text(encoding="utf-8-sig")


def fitting(args, limit, prompt):
    """How many new tokens: those asked for, else as many as usual that fit behind the longest."""
    asked = [len(prompt.ids) + len(question.ids) for question in prompt.questions] if prompt else []
    longest = max(asked or args.bench)
    return args.max_new_tokens or max(1, min(48 if prompt else 128, limit - longest + 1))


def rows_from(args, tokenizer, chat, split, limit=None):
    """The rows that the options of `add_data_options` ask for: Examples, at most `limit`."""
    path = args.data or rows_at_hand(args.ckpt)
    limits = args.min_prompt, args.max_prompt, args.max_response, args.context
    return examples(tokenizer, path, split, chat, *limits, limit or args.limit, args.question,
                    describe(args.ckpt)[1]["max_positions"])


def training_rows(args, tokenizer):
    """-> rows to train on, held-out rows, and what the predictors keep of the template."""
    chat = choose_chat(find(args.ckpt), args.template, args.system)
    print(f"model {find(args.ckpt)}; rows {args.data or rows_at_hand(args.ckpt)}; template "
          f"{chat.name} ({chat.why})", flush=True)
    rows = rows_from(args, tokenizer, chat, "train")
    some = args.report_rows
    heldout = rows_from(args, tokenizer, chat, "heldout", some) if some else []
    if some:
        print(f"held-out reports read {len(heldout)} rows{few(len(heldout))}", flush=True)
    return rows, heldout, {**chat_notes(chat), "weights": weights_key(args.ckpt),
                           "command": command_line()}


def few(n_rows):
    """What is to be said of a number that comes from so few rows."""
    return ": fewer than ten tell little" * (n_rows < 10)


def rows_for_figure(args, tokenizer):
    """The Examples that saliency.py reads: all for Figure 2, the one of Figure 1."""
    chat = choose_chat(find(args.ckpt), args.template, args.system)
    if args.prompt is not None:
        need(args.response, "--prompt needs --response: saliency is the gradient of the "
                            "response's log-likelihood")
        row = {"instruction": args.prompt, "response": args.response}
        return [encode_row(tokenizer, row, chat, args.max_response)]
    if args.figure == 2:
        return rows_from(args, tokenizer, chat, "heldout")
    rows = rows_from(args, tokenizer, chat, "heldout", args.row + 1)
    need(args.row < len(rows), f"--row {args.row}: there are {len(rows)} rows")
    return rows[args.row:]


# --------------------------------------------------------------------------------------- running


def cli(main):
    """Run a command's main: bad input ends in one line on stderr and exit code 1.

    With --json what it prints goes to stderr: stdout is for print_json alone.
    """
    name = Path(sys.argv[0]).name
    try:
        with contextlib.redirect_stdout(sys.stderr if "--json" in sys.argv else sys.stdout):
            main()
            sys.stdout.flush()
        if not alone():
            leave(0)
    except KeyboardInterrupt as e:
        leave(130, str(e) or "stopped")
    except BrokenPipeError:         # `| head`: nobody reads on
        os._exit(141)
    except (ValueError, OSError, ImportError, MemoryError) as e:
        leave(1, f"{name}: {e}")
    except RuntimeError as e:
        if "out of memory" not in str(e) and "DefaultCPUAllocator" not in str(e):
            raise
        leave(1, f"{name}: not enough memory, take shorter prompts or --dtype bfloat16: {e}")


def leave(code, text=""):
    """End the process, with one line on stderr where there is something to say."""
    text = f"{' '.join(text.split()):.1000}"
    if text and sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)      # the line of a Progress
    if alone() and code == 1:
        sys.exit(text)
    if text and (code == 1 or rank() == 0):
        print(text, file=sys.stderr, flush=True)
    if alone():
        sys.exit(code)
    sys.__stdout__.flush()          # the others may wait for this one: torchrun sees that it left
    os._exit(code)


def beside(script, *words):
    """Another of our commands, as a reader would type it who typed the one that runs."""
    return shlex.join(["python", str(Path(sys.argv[0]).with_name(script)), *words])


def command_line():
    """The command that runs, as a reader would type it."""
    script = Path(sys.argv[0])
    words = ["python", *sys.argv]
    if script.parent.name == "lab":
        words[1:2] = ["-m", f"lab.{script.stem}"]
    return shlex.join(words)


def processor():
    """What Linux says of the processor, a text; "" elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def hardware(device):
    """What numbers were measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    told = re.search("model name.*: (.*)", processor())
    name = told[1] if told else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_json(args, model, result):
    """With --json: all that was measured, and how, as one JSON object; the first process does."""
    if args.json and rank() == 0:
        names = ("ckpt", "shape", "figure", "reduce")
        how = {name: value for name, value in vars(args).items() if name in names}
        where = provenance(model) if model else {"command": command_line()}
        print(json.dumps({**where, **how, **result}), file=sys.__stdout__, flush=True)


def provenance(model):
    """What a result needs to be believed: command, commit, hardware, a dict."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:                 # no git here
        commit = ""
    return {"command": command_line(), "processes": int(os.environ.get("WORLD_SIZE", 1)),
            "commit": commit or None, "hardware": hardware(model.device),
            "dtype": str(model.dtype).removeprefix("torch.")}
