"""What all commands share: options, one-line errors, a clean end, and where a number comes from."""
import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import torch

from support.checkpoint import DTYPES, find, read_config
from support.data import encode_row, examples
from support.files import need, writable
from support.places import ROOT, rows_at_hand
from support.progress import clear_line, speaks
from support.templates import TEMPLATES, chosen_template

# ------------------------------------------------------------------------------------------ parsing


def command_parser(doc):
    """A parser whose --help begins with a module's docstring, as it is laid out there."""
    return argparse.ArgumentParser(description=doc,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def at_least(minimum):
    """For argparse: a whole number not below the minimum."""
    def whole(text):
        digits = text.removeprefix("-")
        if not digits.isdigit() or len(text) > 12 or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"expected a whole number, at least {minimum}, not {text!r}")
        return int(text)
    return whole


PICTURES = ("", ".png", ".pdf", ".svg", ".jpg")


def picture_file(text):
    """For argparse: where a picture goes; that it can be drawn is known before the work begins."""
    if not importlib.util.find_spec("matplotlib"):
        raise ImportError("pictures need the optional package matplotlib: pip install matplotlib")
    if Path(text).suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text}: expected a name that ends in .png")
    return output_file(text)


def output_file(text):
    """For argparse: a file that will be written; that it can be is known before the work begins."""
    writable(text)
    return text


def rows_file(text):
    """The same; its folder is made."""
    writable(text, make_folder=True)
    return text


SCHEDULE_HELP = {   # name: type, meaning, the paper's value for 32 blocks
    "first": (int, "the first stage stands after this block", 4),
    "step": (int, "blocks between stages", 3),
    "stages": (int, "number of stages", 10),
    "keep": (float, "stage s keeps keep^s of the prompt", 0.9),
    "sink": (int, "first tokens always kept", 4),
    "local": (float, "share of last tokens always kept", 0.1),
}


def add_schedule_arguments(parser):
    """The options of a prune.Schedule."""
    for name, (kind, meaning, paper) in SCHEDULE_HELP.items():
        parser.add_argument(f"--{name}", type=kind, help=f"{meaning} (paper, 32 blocks: {paper})")


def schedule_options(args):
    """The fields of a Schedule that were given on the command line, a dict."""
    given = {name: getattr(args, name, None) for name in SCHEDULE_HELP}
    return {name: value for name, value in given.items() if value is not None}


def add_template_arguments(parser):
    """The options that say what stands around a user's text; support.data.chosen_template."""
    parser.add_argument("--template", choices=sorted(TEMPLATES), help="prompt template (default: "
                        "the predictors', where they are used, else the checkpoint's)")
    parser.add_argument("--system", metavar="TEXT", help="the prompt's system text (default: the "
                        "template's own; \"\": none)")


def add_data_arguments(parser, limit, max_response=96):
    """The options by which every command chooses its rows; the two are defaults, None for none."""
    parser.add_argument("--data", help="JSONL with instruction, context, response (default: the "
                        "toy's own rows; databricks-dolly-15k.jsonl where it lies)")
    add_template_arguments(parser)
    parser.add_argument("--context", action="store_true", help="only rows that have a context")
    parser.add_argument("--question", choices=("first", "last"), default="first",
                        help="where the instruction stands: before or after the context")
    parser.add_argument("--min-prompt", type=at_least(1), default=1,
                        help="shortest prompt, in tokens")
    parser.add_argument("--max-prompt", type=at_least(1), default=2048,
                        help="longest prompt, in tokens")
    parser.add_argument("--max-response", type=at_least(1), default=max_response,
                        help="responses are cut to this many tokens (default: "
                             f"{max_response or 'not at all'})")
    parser.add_argument("--limit", type=at_least(1), default=limit, help="at most this many rows")


def add_pruning_arguments(parser, scorers=()):
    """The options that say which model prunes by what; support.saved.load_pruning reads them.

    scorers: the names that --scorer may have, where a command takes one.
    """
    if scorers:
        parser.add_argument("--scorer", choices=scorers, default="predictor",
                            help="what ranks the tokens")
    parser.add_argument("--ckpt", default="toy",
                        help="checkpoint directory, as given or under checkpoints/, or random:NAME")
    parser.add_argument("--predictors", help="predictors, a file or its folder (default: those "
                        "trained here, out/NAME, else those in the checkpoint directory)")
    parser.add_argument("--device", help="cuda, cpu or mps (default: cuda if there)")
    parser.add_argument("--dtype", choices=sorted(DTYPES),
                        help="default: bfloat16 on cuda, else float32")
    add_schedule_arguments(parser)


def add_tp_argument(parser):
    parser.add_argument("--tp", action="store_true", help="under torchrun: divide every block's "
                        "heads and SwiGLU among the processes (tensor parallel)")


class JsonAlone(argparse.Action):
    """--json: from here on print() writes to stderr; args.json is the stream of the one object."""

    def __call__(self, parser, args, values, option_string=None):
        args.json = args.json or sys.stdout
        sys.stdout = sys.stderr


def add_json_argument(parser):
    parser.add_argument("--json", action=JsonAlone, nargs=0, default=None, help="print all that "
                        "was measured as one JSON object and nothing else; the text goes to stderr")


def add_quiet_argument(parser):
    parser.add_argument("--quiet", action="store_true", help="say nothing of how far the work is")


def rows_from(args, tokenizer, split, limit=None, metadata=None):
    """The rows that the options of `add_data_arguments` ask for: Examples, at most `limit`.

    metadata: those of predictors, which remember their template.
    """
    if limit == 0:
        return []
    path = args.data or rows_at_hand(args.ckpt)
    template, system, _ = chosen_template(args, metadata or {})
    limit = limit or args.limit
    max_positions = read_config(find(args.ckpt) / "config.json")["max_positions"]
    return examples(tokenizer, path, split, template, args.min_prompt, args.max_prompt,
                    args.max_response, args.context, limit, args.question, system, max_positions)


def chosen_rows(args, tokenizer):
    """The rows that saliency.py reads: all for Figure 2, the one of Figure 1."""
    if args.figure == 2:
        return rows_from(args, tokenizer, "heldout")
    return [chosen_example(args, tokenizer)]


def chosen_example(args, tokenizer):
    """The row for Figure 1: --prompt with --response, or --row of the held-out rows."""
    if args.prompt is not None:
        need(args.prompt.strip(), "the prompt is empty")
        need(args.response, "--prompt needs --response: saliency is the gradient of the "
                            "response's log-likelihood")
        row = {"instruction": args.prompt, "response": args.response}
        template, system, _ = chosen_template(args, {})
        example = encode_row(tokenizer, row, template, None, system=system)
        n = len(example.tokens) - example.prompt_len
        need(n <= args.max_response,
             f"--response has {n} tokens: --max-response {n} takes it whole")
        return example
    rows = rows_from(args, tokenizer, "heldout", args.row + 1)
    need(args.row < len(rows), f"--row {args.row}: there are {len(rows)} rows")
    return rows[args.row]


# --------------------------------------------------------------------------------------- running


def cli(main):
    """Run a command's main: bad input ends in one line on stderr and exit code 1.

    Ctrl-C ends it in one line and code 130; a second one ends the process at once.
    """
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupted)
        run(main)
    except KeyboardInterrupt as e:  # with a text from where there is something to say
        clear_line()
        if speaks():
            print(str(e) or "stopped", file=sys.stderr, flush=True)
        leave(130)


def run(main):
    """`main`, and what it raises told in one line; all but Ctrl-C."""
    try:
        with contextlib.redirect_stdout(sys.stdout):        # --json turns it, for this command
            main()
            sys.stdout.flush()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            sys.__stdout__.flush()
            leave(0)        # torch's threads may abort a process that is torn down piece by piece
    except BrokenPipeError:         # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # for what is still to be flushed
        leave(141)                  # as if by SIGPIPE
    except (ValueError, OSError, ImportError) as e:
        fail(str(e))
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        fail("not enough memory: take shorter prompts or rows, a smaller --batch or --dtype "
             f"bfloat16. {e}")
    finally:
        let_go()


def interrupted(number, frame):
    """What the first Ctrl-C does."""
    let_go()
    raise KeyboardInterrupt


def let_go():
    """From here on signals end the process at once and without a word."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def out_of_memory(error):
    """Whether no memory was left, on a CPU or a GPU."""
    signs = ("DefaultCPUAllocator", "out of memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def fail(text):
    """Leave with one line on stderr and code 1."""
    text = " ".join(text.split())
    text = text if len(text) <= 1000 else text[:1000] + " ..."
    text = f"{Path(sys.argv[0]).name}: {text}"
    clear_line()
    if alone():
        sys.exit(text)
    print(text, file=sys.stderr, flush=True)
    leave(1)


def alone():
    return int(os.environ.get("WORLD_SIZE", 1)) == 1


def leave(code):
    """Leave with this exit code."""
    if alone():
        sys.exit(code)
    # The other processes may wait for this one: torchrun has to see that it is gone.
    os._exit(code)


# ------------------------------------------------------------------------------------- provenance


def command_line():
    """The command that runs, as a reader would type it."""
    script = Path(sys.argv[0])
    if script.parent.name == "lab":
        return " ".join(["python -m", f"lab.{script.stem}", *sys.argv[1:]])
    return " ".join(["python", *sys.argv])


def hardware(device):
    """What numbers were measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":")[1].strip() for line in lines if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_json(args, model, result):
    """With --json: all that was measured, and how, as one JSON object; the first process does."""
    if args.json and speaks():
        names = ("ckpt", "shape", "scorer", "figure", "reduce")
        how = {name: value for name, value in vars(args).items() if name in names}
        where = provenance(model) if model else {"command": command_line()}
        print(json.dumps({**where, **how, **result}), file=args.json, flush=True)


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
