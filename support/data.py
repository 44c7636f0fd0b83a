"""Rows of a data file -> prompts and responses as token ids.

Data files hold one JSON object a line with instruction, context and response, as in
databricks-dolly-15k. The last tenth of a file is never trained on: its first half is held out to
measure on, its second half to choose by.
"""
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from model import per_row, positions
from support.checkpoint import find
from support.files import blame, need
from support.parallel import rank


class Template(NamedTuple):
    """How a model's own chat template writes a prompt: a text goes into {}, the answer follows.

    inside: the system text stands in the user's turn, before the user's text; else it has a turn
    of its own. strips: white space around what goes into a turn is left out.
    """
    user: str
    system: Optional[str] = None            # None: there is no place for a system text
    default_system: Optional[str] = None    # the system text where none is asked for
    inside: bool = False
    strips: bool = False

    def turn(self, form, text):
        return form.replace("{}", text.strip() if self.strips else text)


CHATML = Template(user="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
                  system="<|im_start|>system\n{}<|im_end|>\n")
LLAMA3 = Template(user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
                       "<|start_header_id|>assistant<|end_header_id|>\n\n",
                  system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
                  strips=True)
# Begin-of-text is not in them: Tokenizer.encode puts it in front, where the model has it.
TEMPLATES = {
    "plain": Template("{}"),
    "chatml": CHATML,
    "smollm2": CHATML._replace(
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "qwen2": CHATML._replace(default_system="You are a helpful assistant."),
    "qwen2.5": CHATML._replace(default_system="You are Qwen, created by Alibaba Cloud. "
                                              "You are a helpful assistant."),
    "llama-2": Template("[INST] {} [/INST]", "<<SYS>>\n{}\n<</SYS>>\n\n", inside=True, strips=True),
    "llama-3": LLAMA3,
    # 3.1 and 3.3 have a system turn even without a system text; in 3.2 the day is today's
    "llama-3.1": LLAMA3._replace(
        system="<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
               "December 2023\nToday Date: 26 Jul 2024\n\n{}<|eot_id|>",
        default_system=""),
    # 0.1, 0.2 and Mixtral; the space before the first [ is the tokenizer's
    "mistral": Template("[INST] {} [/INST]", "{}\n\n", inside=True),
    "mistral-v3": Template("[INST] {}[/INST]", "{}\n\n", inside=True),
}
# Characters in a part of a prompt: more than any context holds, and tokenizing them may take
# gigabytes.
MAX_TEXT = 10**6


IGNORE = -100       # a label that is not to be predicted


class Example(NamedTuple):
    tokens: torch.Tensor            # (N,) prompt, then response
    prompt_len: int


class Batch(NamedTuple):
    """Rows side by side, padded on the right."""
    tokens: torch.Tensor            # (B, N) prompt, then response, then padding
    prompt_len: list                # B prompt lengths
    lengths: list                   # B lengths of prompt and response


def response_labels(tokens, prompt_len, lengths=None):
    """What is to be predicted: tokens (B, N) -> (B, R), R = N - the shortest prompt.

    IGNORE stands where a row still has prompt, or already padding. prompt_len: an int, or a list
    of B; lengths: B row lengths, where rows are padded on the right.
    """
    B, N = tokens.shape
    prompt_len = per_row(prompt_len, B)
    lengths = per_row(lengths or N, B)
    for p, n in zip(prompt_len, lengths):
        need(1 <= p < n <= N, f"marking needs a prompt and a response: {p} prompt tokens of {n}")
    start = torch.tensor(prompt_len, device=tokens.device)
    end = torch.tensor(lengths, device=tokens.device)
    pos = positions(tokens)
    outside = (pos < start[:, None]) | (pos >= end[:, None])
    labels = tokens.masked_fill(outside, IGNORE)
    return labels[:, min(prompt_len):]


def pad(examples, device):
    """Examples -> Batch."""
    rows = [e.tokens for e in examples]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    return Batch(tokens, [e.prompt_len for e in examples], [len(row) for row in rows])


# ------------------------------------------------------------------------------------------- files


def read_rows(path, split="all", fields=("instruction", "context", "response")):
    """Rows of a JSONL file, a list of dicts; `fields` have to be text (a context may be absent).

    split: "train" is the first 90%, "heldout" the next 5% (to measure on), "validation" the last
    5% (to choose by), both without rows whose context stands in an earlier split; "all".
    Raises ValueError with file and line number for what is not such a row.
    """
    path = Path(path)
    need(path.is_file(), f"{path}: no such data file")
    rows = []
    with path.open("rb") as f:
        for number, line in enumerate(f, start=1):
            if line.strip():
                rows.append(parse_row(line, f"{path}, line {number}", fields))
    if split == "all":
        return rows
    train_end = len(rows) - max(1, len(rows) // 10)
    heldout_end = len(rows) - len(rows) // 20
    if split == "train":
        return rows[:train_end]
    start, end = (train_end, heldout_end) if split == "heldout" else (heldout_end, len(rows))
    known = {row["context"] for row in rows[:start] if row.get("context")}
    return [row for row in rows[start:end] if row.get("context") not in known]


def parse_row(line, where, fields):
    """One line, bytes -> dict."""
    try:
        row = json.loads(line.decode())
        json.dumps(row, ensure_ascii=False).encode()    # a lone surrogate is no text
    except (ValueError, RecursionError) as e:           # also bytes that are not UTF-8
        raise ValueError(f"{where}: not valid JSON ({e})") from None
    need(isinstance(row, dict), f"{where}: expected a JSON object")
    for field in fields:
        value = row.get(field)
        if field == "context" and value is None:
            continue
        need(isinstance(value, str), f"{where}: {field!r} is missing or not text")
        need(field == "text" or len(value) <= MAX_TEXT,
             f"{where}: {field!r} has more than {MAX_TEXT:,} characters")
    return row


# ---------------------------------------------------------------------------------------- encoding


def prompt_text(row, template="plain", question="first", system=None):
    """The prompt of a row: the template around instruction, blank line, context.

    question="last" puts the context before the instruction. system: the system text, "" for no
    system turn; without one the template's own, if it has one.
    """
    need(template in TEMPLATES,
         f"unknown prompt template {template!r}; there are {', '.join(TEMPLATES)}")
    form = TEMPLATES[template]
    system = form.default_system if system is None else system or None
    need(system is None or form.system,
         f"the prompt template {template!r} has no place for a system text: leave out --system, "
         "or choose another --template")
    parts = [row["instruction"]]
    if row.get("context"):
        parts.insert(1 if question == "first" else 0, row["context"])
    text = "\n\n".join(parts)
    if system is None:
        return form.turn(form.user, text)
    if form.inside:
        return form.turn(form.user, form.system.replace("{}", system) + text)
    return form.turn(form.system, system) + form.turn(form.user, text)


def chosen_template(args, metadata):
    """--template and --system, else what the predictors' metadata say -> (template, system text).

    A system text in the metadata is one for the template there.
    """
    template, system = args.template or metadata.get("template", "plain"), args.system
    if system is None and template == metadata.get("template"):
        system = metadata.get("system")
    return template, system


def prompt_notes(args):
    """What predictors keep of the prompts that they were trained on; see `chosen_template`."""
    notes = {"template": args.template or "plain"}
    return notes if args.system is None else notes | {"system": args.system}


def encode_row(tokenizer, row, template="plain", max_response=96, question="first", system=None):
    """A row {instruction, context, response} -> Example; the response is cut."""
    prompt = tokenizer.encode(prompt_text(row, template, question, system))
    response = tokenizer.encode(row["response"], bos=False)[:max_response]
    return Example(torch.tensor(prompt + response), len(prompt))


def examples(tokenizer, path, split, template="plain", min_prompt=1, max_prompt=4096,
             max_response=96, context=False, limit=None, question="first", system=None,
             max_positions=2**31):
    """Encoded rows of a file whose prompt has min_prompt to max_prompt tokens, at most `limit`.

    context: only rows that have one. max_response: responses are cut to so many tokens, None: not.
    max_positions: the model's; a row of more tokens is left out, and one without a response.
    One line says how many rows are left out or cut.
    """
    found, lost, cut = [], Counter(), 0

    def fault(n, N):
        """Why a row of N tokens, n of them the prompt, is left out; "" for one that is not."""
        if n < min_prompt:
            return f"shorter than --min-prompt {min_prompt}"
        if n > max_prompt:
            return f"longer than --max-prompt {max_prompt}"
        if n == N:
            return "without a response"
        beyond = f"longer than the model's {max_positions:,} positions"
        return beyond if N > max_positions else ""

    for row in read_rows(path, split):
        if context and not row.get("context"):
            lost["without a context"] += 1
            continue
        whole = encode_row(tokenizer, row, template, None, question, system)
        n = whole.prompt_len
        tokens = whole.tokens[:n + max_response] if max_response else whole.tokens
        why = fault(n, len(tokens))
        if why:
            lost[why] += 1
            continue
        cut += len(tokens) < len(whole.tokens)
        found.append(Example(tokens, n))
        if len(found) == limit:
            break
    cuts = {f"responses cut to {max_response} tokens": cut}
    need(found, f"{path}: no {split} row with a prompt of {min_prompt} to {max_prompt} tokens"
                f"{listed('; left out: ', lost)}")
    tell_losses(path, f"{split}: {len(found)} rows", lost, cuts)
    return found


def listed(head, counts):
    """Head and the counts {what: number} that are not 0, as text; "" where all are."""
    parts = [f"{number:,} {what}" for what, number in counts.items() if number]
    return head + ", ".join(parts) if parts else ""


def tell_losses(path, rows, lost, cuts):
    """Print one line that says which rows are left out, and what is cut, if any is.

    rows: text about those that are used; lost, cuts: {what: number}.
    """
    losses = listed("; left out: ", lost) + listed("; ", cuts)
    if losses and rank() == 0:
        print(f"{Path(path).name}, {rows}{losses}", flush=True)


def digest(*parts):
    """A short hash of what a result depends on.

    A part is a list of Examples, a module, a file (a Path) or anything that JSON knows.
    """
    hashed = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for p in part.parameters():
                p = p.to_local() if hasattr(p, "to_local") else p   # this process's slice
                hashed.update(p.detach().float().cpu().numpy().tobytes())
        elif isinstance(part, Path):
            hashed.update(part.read_bytes())
        elif isinstance(part, list) and part and isinstance(part[0], Example):
            for e in part:
                hashed.update(e.tokens.numpy().tobytes() + str(e.prompt_len).encode())
        else:
            hashed.update(json.dumps(part, default=str).encode())
    return hashed.hexdigest()[:16]


def chosen_prompt(args, tokenizer, metadata):
    """The prompt that infer.py's options ask for -> token ids, and the right answer if known."""
    expected = None
    sources = args.prompt, args.prompt_file, args.data
    need(sources.count(None) > 1,
         "--prompt, --prompt-file and --data each say what to read: leave all but one out")
    if args.prompt is not None:
        row = {"instruction": args.prompt}
    elif args.prompt_file is not None:
        with blame(args.prompt_file, "not UTF-8 text"):
            row = {"instruction": Path(args.prompt_file).read_text(encoding="utf-8")}
    else:
        path = args.data or find(args.ckpt) / "train.jsonl"
        need(Path(path).is_file(),
             "say what to read: --prompt TEXT, --prompt-file FILE or --data FILE")
        rows = read_rows(path, "heldout")
        need(args.row < len(rows), f"--row {args.row}: {path} has {len(rows)} held-out rows")
        row = rows[args.row]
        expected = row["response"]
    need(row["instruction"].strip(), "the prompt is empty")
    template, system = chosen_template(args, metadata)
    return tokenizer.encode(prompt_text(row, template, system=system)), expected
