"""What the commands share and the paper does not speak of: rows of a data file, options, errors, provenance of a result.

Data files hold one JSON object a line with instruction, context and response (databricks-dolly-15k's layout). The last
tenth of such a file is never trained on: the first half of it is held out for eval.py, the other half for choosing.
"""
import argparse
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from model import need

TEMPLATES = {  # the user's text goes into {}; the answer follows
    "plain": "{}",
    "llama-2": "[INST] {} [/INST]",
    "llama-3": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatml": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
}
MAX_TEXT = 10**6    # characters in a part of a prompt: more than any context holds, and tokenizing them could take gigabytes


class Example(NamedTuple):
    tokens: torch.Tensor            # (N,) prompt then response
    prompt_len: int


def read_rows(path, split="all", fields=("instruction", "context", "response")):
    """Rows of a JSONL file, whose `fields` must be text (a context may be absent).

    split: "train" = the first 90%, "heldout" = the next 5% (to measure on), "validation" = the last 5% (to choose by), both
    without the rows whose context stands in an earlier split; "all".
    """
    path = Path(path)
    need(path.is_file(), f"{path}: no such data file")
    rows = []
    with path.open("rb") as f:
        for number, line in enumerate(f, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line.decode()))
                json.dumps(rows[-1], ensure_ascii=False).encode()    # a lone surrogate is no text
            except (ValueError, RecursionError) as e:                # also what is not UTF-8
                raise ValueError(f"{path}, line {number}: not valid JSON ({e})") from None
            need(isinstance(rows[-1], dict), f"{path}, line {number}: expected a JSON object")
            for field in fields:
                value = rows[-1].get(field, "" if field == "context" else None)
                need(isinstance(value, str) or field == "context" and value is None, f"{path}, line {number}: {field!r} is missing or not text")
                need(field == "text" or len(value or "") <= MAX_TEXT, f"{path}, line {number}: {field!r} has more than {MAX_TEXT:,} characters")
    cut = len(rows) - max(1, len(rows) // 10)
    if split in ("heldout", "validation"):
        start, end = (cut, len(rows) - len(rows) // 20) if split == "heldout" else (len(rows) - len(rows) // 20, len(rows))
        known = {row["context"] for row in rows[:start] if row.get("context")}
        return [row for row in rows[start:end] if row.get("context") not in known]
    return rows if split == "all" else rows[:cut]


def prompt_text(row, template="plain", question="first"):
    """The prompt of a Dolly row: in the template, the instruction and, after a blank line, the context, or the other way round."""
    need(template in TEMPLATES, f"unknown prompt template {template!r}; there are {', '.join(TEMPLATES)}")
    parts = [row["instruction"]] + ([row["context"]] if row.get("context") else [])
    return TEMPLATES[template].replace("{}", "\n\n".join(parts if question == "first" else reversed(parts)))


def encode_row(tokenizer, row, template="plain", max_response=96, question="first"):
    """A Dolly row {instruction, context, response} -> Example."""
    prompt = tokenizer.encode(prompt_text(row, template, question))
    response = tokenizer.encode(row["response"], bos=False)[:max_response]
    return Example(torch.tensor(prompt + response), len(prompt))


def examples(tokenizer, path, split, template="plain", min_prompt=1, max_prompt=4096, max_response=96, context=False, limit=None, question="first"):
    """Encoded rows of a file whose prompt has min_prompt..max_prompt tokens (`context`: only rows that have one), at most `limit`."""
    found = []
    for row in read_rows(path, split):
        if context and not row.get("context"):
            continue
        example = encode_row(tokenizer, row, template, max_response, question)
        if min_prompt <= example.prompt_len <= max_prompt and example.prompt_len < len(example.tokens):
            found.append(example)
            if limit and len(found) == limit:
                break
    need(found, f"{path}: no {split} row with a prompt of {min_prompt} to {max_prompt} tokens")
    return found


def digest(*parts):
    """A short hash of what a result depends on: examples, modules, files (a Path) or anything JSON knows."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for p in part.parameters():
                p = p.to_local() if hasattr(p, "to_local") else p    # of a parameter in slices this process's
                found.update(p.detach().float().cpu().numpy().tobytes())
        elif isinstance(part, Path):
            found.update(part.read_bytes())
        elif isinstance(part, list) and part and isinstance(part[0], Example):
            for e in part:
                found.update(e.tokens.numpy().tobytes() + bytes(str(e.prompt_len), "ascii"))
        else:
            found.update(json.dumps(part, default=str).encode())
    return found.hexdigest()[:16]


def add_data_arguments(parser, limit):
    """The options by which every command chooses its rows."""
    parser.add_argument("--data", help="JSONL with instruction, context, response (default: the toy's own rows)")
    parser.add_argument("--template", choices=sorted(TEMPLATES), help="prompt template (default: plain; eval.py: the predictors')")
    parser.add_argument("--context", action="store_true", help="only rows that have a context")
    parser.add_argument("--question", choices=("first", "last"), default="first", help="where the instruction stands: before or after the context")
    parser.add_argument("--min-prompt", type=at_least(1), default=1, help="shortest prompt, in tokens")
    parser.add_argument("--max-prompt", type=at_least(1), default=2048, help="longest prompt, in tokens")
    parser.add_argument("--max-response", type=at_least(1), default=96, help="responses are cut to this many tokens")
    parser.add_argument("--limit", type=at_least(1), default=limit, help="at most this many rows")


def rows_from(args, tokenizer, split, template=None, limit=None):
    """`examples` with the options of `add_data_arguments`."""
    need(args.data or Path(args.ckpt).name == "toy", f"{args.ckpt} has no rows of its own: name a file with --data")
    path = args.data or Path(__file__).resolve().parent / "checkpoints" / "toy" / "train.jsonl"
    return examples(tokenizer, path, split, args.template or template or "plain", args.min_prompt, args.max_prompt, args.max_response,
                    args.context, limit or args.limit, args.question)


def at_least(minimum):
    """For argparse: a whole number not below the minimum."""
    def whole(text):
        if not text.lstrip("-").isdigit() or len(text) > 12 or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number, at least {minimum}, not {text!r}")
        return int(text)
    return whole


def hardware(device):
    """What the numbers were measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "") if Path("/proc/cpuinfo").exists() else ""
    return f"{cpu or platform.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def provenance(model):
    """What a result needs to be believed: command, commit, hardware."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=7"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return {"command": "python " + " ".join(sys.argv), "processes": int(os.environ.get("WORLD_SIZE", 1)), "commit": commit or None, "hardware": hardware(model.device), "dtype": str(model.dtype).removeprefix("torch.")}


def output(path, name):
    """Where to write: a file of the suffix of `name`, or `name` in a directory, which is made. That it can be written is known before the work."""
    path = Path(path)
    path = path if path.suffix == Path(name).suffix else path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()
    return path


@contextlib.contextmanager
def blame(path, fault):
    """Whatever goes wrong inside, in torch or with what a file's metadata holds, is that file's fault."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as e:             # a RecursionError is a RuntimeError
        raise ValueError(f"{path}: {fault} ({e})") from None


def cli(main):
    """Run a command's main: bad input ends in one line on stderr and exit code 1, not in a traceback."""
    try:
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as e:
        text = " ".join(str(e).split())
        text = f"{Path(sys.argv[0]).name}: {text if len(text) <= 1000 else text[:1000] + ' ...'}"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:                 # leave at once: the others may wait for this one, which torchrun has to see gone
            print(text, file=sys.stderr, flush=True)
            os._exit(1)
        sys.exit(text)
    except KeyboardInterrupt:
        sys.exit("\nstopped")
