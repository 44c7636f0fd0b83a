"""Hundreds of damaged files: each is used as it is or refused in one clear line.

    python tests/test_mutations.py --count 2000 --seed 7        # a larger run, with its table
    python tests/test_mutations.py --seed 7 --only 123          # one case again, with its traceback

A case is a directory of small good files (a checkpoint, predictors, a training state, rows) of
which one is damaged: bits flipped, cut, JSON values replaced, shapes that overflow, links, names
that lead out of the directory. A child process reads all of them as the commands do and answers a
prompt. Whatever it does but these two things is FORBIDDEN: an error of another kind (a traceback
of torch's), one that names no file, a hang, a crash, more than 400 MB of memory, a file opened
elsewhere, a command or a pickle run. torch is imported once; every case is a fork of that.
"""
import argparse
import contextlib
import copy
import gc
import importlib.util
import io
import json
import operator
import os
import pickle
import random
import resource
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "checkpoints" / "toy"
ALLOWED = ("works", "clear error")
FORBIDDEN = ("OTHER EXCEPTION", "NO FILE NAMED", "HANG", "CRASH", "MEMORY", "OUTSIDE")
VOCAB = 1284                        # the toy's 1280 pieces and added tokens
ADDED = ("<|im_start|>", "<|im_end|>", "<pad>")
SECONDS = 20                        # what one case may take
MEGABYTES = 400                     # and its memory above that of undamaged files


@pytest.mark.beside
def test_damaged_files_are_used_or_refused_in_one_clear_line():
    if sys.platform != "linux":
        pytest.skip("forks, and reads memory from /proc")
    words = [sys.executable, __file__, "--count", "600", "--seed", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


# --------------------------------------------------------------------------- the undamaged files


def write_files(folder):
    """Two directories of good files, each in another layout of a checkpoint.

    "sharded" has two files of weights and the toy's tokenizer with added_tokens.json, "single" one
    file of weights and a tokenizer.json, its added tokens in tokenizer_config.json too. In both are
    rows, predictors and the state of a training stopped half-way.
    """
    import golden
    cases = checkpoint_cases(golden.cases())
    places = []
    for name in cases:
        place = folder / name
        with mock.patch.multiple(golden, VOCAB=VOCAB, cases=lambda: cases):
            golden.write_checkpoint(place, name)
        write_rows(place)
        ends = {"bos_token_id": 1, "eos_token_id": [2, 5], "do_sample": True, "temperature": 0.7}
        (place / "generation_config.json").write_text(json.dumps(ends))
        write_tokenizer(place, fast=name == "single")
        train_half(place)
        places.append(place)
    return places


def checkpoint_cases(known):
    """The two config.json: small, so that a case takes little, with room for the tokenizers."""
    sharded = {
        **known["sharded"],
        "rope_scaling": known["llama3"]["rope_scaling"],
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
    }
    single = {**sharded, "tie_word_embeddings": True, "rope_scaling": None}
    return {"sharded": sharded, "single": single}


def write_rows(place):
    """Twenty of the toy's rows, their prompts cut short."""
    lines = (TOY / "train.jsonl").read_text().splitlines()[:20]
    with (place / "rows.jsonl").open("w") as f:
        for row in map(json.loads, lines):
            cut = {"instruction": row["instruction"][-120:], "context": None,
                   "response": row["response"]}
            f.write(json.dumps(cut) + "\n")


def write_tokenizer(place, fast):
    """A tokenizer.json (if `fast`, where that package is installed) or the toy's tokenizer.

    Both have the tokens ADDED. A tokenizer.json has the truncation and padding of some training.
    """
    settings = {"add_bos_token": True, "add_eos_token": False, "model_max_length": 2048,
                "tokenizer_class": "LlamaTokenizer", "legacy": False, "eos_token": "</s>"}
    made = fast and importlib.util.find_spec("tokenizers")
    if made:
        made = make_tokenizer()
        made.save(str(place / "tokenizer.json"))
    else:
        shutil.copy(TOY / "tokenizer.model", place)
    first = made.token_to_id(ADDED[0]) if made else 1280
    if fast:
        listed = {str(first + i): {"content": text, "lstrip": i == 2, "special": i < 2}
                  for i, text in enumerate(ADDED)}
        settings["added_tokens_decoder"] = listed
    else:
        listed = {text: first + i for i, text in enumerate(ADDED)}
        (place / "added_tokens.json").write_text(json.dumps(listed))
    (place / "tokenizer_config.json").write_text(json.dumps(settings))


def make_tokenizer():
    """A tokenizer of the package tokenizers: bytes and a few merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h")]
    for vowel in "aeiou":
        merges += [(vowel, consonant) for consonant in "nrst"]
    merges.append(("th", "e"))
    pieces = ["<s>", "</s>", *letters, *map("".join, merges)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", *ADDED[:2]])
    tokenizer.add_tokens([AddedToken(ADDED[2], lstrip=True)])
    tokenizer.enable_truncation(500, stride=2)
    tokenizer.enable_padding(length=8)
    return tokenizer


def train_half(place):
    """Leave the predictors and the state of a training that a signal stopped after step 1."""
    with contextlib.suppress(KeyboardInterrupt):
        train_on(place, stop=[signal.SIGTERM])
    settle(place / "predictors.safetensors", command="python train.py")
    settle(place / "predictors_state.safetensors")


def settle(path, **notes):
    """Make a safetensors file the same every time: its metadata by name, some with fixed text."""
    header, body = split_header(path.read_bytes())
    metadata = header["__metadata__"] | notes
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(prefixed(text + b" " * (-len(text) % 8), body))


# ----------------------------------------------------------------------- what is done with files


def use(folder, resume=False):
    """What the commands do with such files: answer prompts, or resume a training."""
    if resume:
        train_on(folder)
    else:
        answer(folder)


def answer(folder):
    """Two prompts alone, two rows in one batch, two new tokens each."""
    import infer
    import torch
    from lab.batch import generate_batch
    from lab.scorers import make_scorer
    from model import Tokenizer
    from support.saved import load_pruning
    tokenizer = Tokenizer(folder)
    rows = rows_of(folder, tokenizer)
    args = SimpleNamespace(ckpt=str(folder), predictors=str(folder / "predictors.safetensors"),
                           device="cpu", dtype=None, tp=False, scorer="prior")
    model, schedule, predictors, metadata = load_pruning(args)
    scorer = make_scorer("prior", model, schedule, predictors, prior=metadata["prior"])
    for text in ("<|im_start|>What does Clara sell?\n\u6771\u4eac \U0001f642<|im_end|> <pad>",
                 "the " * 30):
        tokens = torch.tensor([tokenizer.encode(text)])
        said = infer.generate(model, tokens, 2, schedule, scorer).tokens
        tokenizer.decode(said)
        for token in said:
            tokenizer.piece(token)
    prompts = [row.tokens[:row.prompt_len].tolist() for row in rows[:2]]
    generate_batch(model, prompts, 2, schedule, scorer)


def train_on(folder, stop=()):
    """Train for two steps, or what is left of them by the state in the folder."""
    import train
    from model import Tokenizer, load
    from prune import Schedule
    rows = rows_of(folder, Tokenizer(folder))
    recipe = train.Recipe(train.Loss(cls=0.0), states="marked", steps=2, accum=1)
    train.fit(load(folder, device="cpu"), rows, Schedule(1, 1, 3, 0.8), recipe,
              folder / "predictors.safetensors", resume=True, stop=stop)


def rows_of(folder, tokenizer):
    from support.data import examples
    return examples(tokenizer, folder / "rows.jsonl", "train", max_response=8)


# ---------------------------------------------------------------------------------------- damage

TEXTS = [
    "", "x" * 10000, "../../etc/passwd", "/etc/passwd", "..", ".", "sub/../x", "a\0b",
    "\u202e\u00e9", "\x1b[2J\n", "nan", "-1", "1e400", "9" * 5000, "F32", "I64", "BOOL",
    "F8_E4M3", "F4", "C64", "default", "llama3", "silu", "mistral", "qwen2",
    "model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "n" * 300,
    "os.system('true')"]
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 1.5, 64.0, 1000, 2**20, 2**24, 10**9, 2**31, 2**53,
    2**63, 2**64, -2**63, 10**30, 1e-300, 1e300, [], {}, [[]], {"a": {}}, [0] * 50,
    [2**32, 2**32, 2**32], [2**62, 0], [2**63], [0, 0], [-1, 4], [0, 2**63], [2**63, 0]]
RAW = [
    "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000, '"\\ud800"', '"\\u0000"',
    "[" * 100000, "[" * 900 + "]" * 900, '{"a":' * 50000, "01", "'a'", "tru", ""]
MARK = "@raw@"                      # stands for one of RAW, which json.dumps would not write
WAYS = ("value", "value", "value", "text", "raw", "raw", "delete", "number", "number", "swap",
        "add")


def spots(value):
    """All (container, key) of a JSON value."""
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    else:
        return []
    found = []
    for key in keys:
        found.append((value, key))
        found += spots(value[key])
    return found


def damage_spot(places, draw):
    """Change one of the places of a JSON value."""
    inside, key = draw.choice(places)
    old = inside[key]
    way = draw.choice(WAYS)
    if way == "delete":
        del inside[key]
    elif way == "swap":
        other, other_key = draw.choice(places)
        new = copy.deepcopy(other[other_key])
        inside[key], other[other_key] = new, copy.deepcopy(old)
    elif way == "add" and isinstance(inside, dict):
        value = copy.deepcopy(draw.choice(VALUES))
        inside[draw.choice(TEXTS)] = value
    elif way == "number" and type(old) in (int, float):
        numbers = (old + 1, old - 1, old * 2, old // 2, -old, old * 10**9)
        inside[key] = draw.choice((*numbers, float(old), str(old), [old]))
    else:
        choices = {"text": TEXTS, "raw": [MARK]}.get(way, VALUES)
        inside[key] = copy.deepcopy(draw.choice(choices))


def damage_json(value, draw):
    """A JSON value -> text in which one to three places are wrong."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = spots(value)
        if not places:
            break
        damage_spot(places, draw)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    if isinstance(value, dict) and value and draw.random() < 0.15:   # the same key twice
        key = json.dumps(draw.choice(list(value)))
        again = f"{key}: {json.dumps(draw.choice(VALUES))}"
        first, last = f"{{{again}, {text[1:]}", f"{text[:-1]}, {again}}}"
        text = draw.choice((first, last))
    text = text.replace(json.dumps(MARK), draw.choice(RAW))
    return text.encode("utf-8", "surrogatepass")


def damage_json_file(data, draw):
    return damage_json(json.loads(data), draw)


def damage_lists(data, draw):
    """Of a tokenizer's files nothing but the added tokens, truncation and padding."""
    value = json.loads(data)
    names = ("added_tokens", "added_tokens_decoder", "truncation", "padding")
    parts = {name: value.pop(name) for name in names if name in value}
    if not parts:                       # added_tokens.json holds nothing else
        return damage_json(value, draw)
    if draw.random() < 0.5:
        name = draw.choice(list(parts))
        value |= {other: part for other, part in parts.items() if other != name}
        parts = {name: parts[name]}
    whole = json.dumps(value).encode()
    return whole[:-1] + b", " + damage_json(parts, draw)[1:]


def damage_bytes(data, draw):
    """What disks, editors and interrupted downloads do.

    Flipped bits, cuts, insertions, other encodings, a line of 10 MB.
    """
    data = bytearray(data)
    way = draw.randrange(11)
    at = draw.randrange(len(data) + 1)
    if way <= 1:
        for _ in range(draw.choice((1, 1, 3, 20, 300))):
            place = draw.randrange(len(data))
            data[place] ^= 1 << draw.randrange(8)
    elif way == 2:
        del data[at:]
    elif way == 3:
        del data[at:at + draw.choice((1, 2, 8, 100))]
    elif way == 4:
        noise = draw.randbytes(20)
        data[at:at] = draw.choice(
            (b"\0", b"\xff", b"\n", b'"', b"{", noise, bytes(1000), b"[" * 100000))
    elif way == 5:
        zeros = bytes(draw.choice((1, 8, 200)))
        data[at:at + draw.choice((1, 8, 200))] = zeros
    elif way == 6:
        start = draw.randrange(len(data))
        data[at:at] = data[start:start + 200]
    elif way == 7:
        system = b"\x80\4\x95cos\nsystem\n(S'true'\ntR."       # a pickle that runs a command
        data[:0] = draw.choice(
            (b"\xef\xbb\xbf", b"\xff\xfe", b"\0\0", b"\n" * 5, b"PK\3\4", system))
    elif way == 8:
        noise = draw.randbytes(1000)
        data = draw.choice(
            (b"", b"\0", b"\n", b"null", b"{}", b"[]", b"0", b'""', b"\x80", bytes(8),
             b"\xff" * 8, noise, bytes(data) * 2))
    elif way == 9:
        encoding = draw.choice(("utf-16", "utf-32", "latin-1"))
        data = data.decode("utf-8", "replace").encode(encoding, "replace")
    else:
        data[at:at] = draw.choice((b" ", b"a", b"\0", b"9")) * 10**7
    return bytes(data)


def split_header(data):
    """A safetensors file -> its header, a dict, and its values, bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def prefixed(text, body):
    """A safetensors file: the header's length, the header, the values."""
    return len(text).to_bytes(8, "little") + text + body


def pack(tensors, metadata):
    """{name: [dtype, shape, bytes]} -> a safetensors file.

    Its offsets are right, whatever the shapes.
    """
    header = {"__metadata__": metadata} if metadata else {}
    body = b""
    for name, (dtype, shape, values) in tensors.items():
        offsets = [len(body), len(body) + len(values)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += values
    return prefixed(json.dumps(header).encode(), body)


TYPES = (("F16", 2), ("BF16", 2), ("I32", 4), ("U8", 1), ("BOOL", 1), ("F8_E4M3", 1),
         ("F8_E8M0", 1), ("F64", 8), ("C64", 8), ("U64", 8))         # and the bytes of a value
NUMBERS = (                         # as little-endian fp32
    b"\0\0\xc0\x7f",                # nan
    b"\0\0\x80\xff",                # -infinity
    b"\xff\xff\x7f\x7f",            # the largest
    b"\0\0\0\0",                    # zero
    b"\1\0\0\0")                    # the smallest above zero


def damage_tensor(tensors, name, draw):
    """Make one of {name: [dtype, shape, bytes]} wrong, or take it away."""
    dtype, shape, values = tensors[name]
    n = len(values) // 4
    way = draw.randrange(9)
    if way == 0:
        del tensors[name]
    elif way == 1:
        tensor = tensors.pop(name)
        tensors[draw.choice(TEXTS) or name + ".x"] = tensor
    elif way == 2:
        shapes = (shape[::-1], [n], [1, *shape], [*shape, 1], [1] * 70 + shape)
        tensors[name] = [dtype, draw.choice(shapes), values]
    elif way == 3:                  # no values, and a shape of any size
        shapes = ([0], [0, *shape], [2**40, 0], [0, 2**40], [2**62, 0], [2**31, 2**31, 0],
                  [*shape[1:], 0])
        tensors[name] = [dtype, draw.choice(shapes), b""]
    elif way == 4 and shape:
        tensors[name] = [dtype, [shape[0] * 2, *shape[1:]], values * 2]
    elif way == 5:                  # as many values of another type
        kind, width = draw.choice(TYPES)
        tensors[name] = [kind, shape, bytes(width * n) if dtype == "F32" else values]
    elif way == 6:
        tensors[name] = [dtype, shape, draw.choice(NUMBERS) * n]
    elif way == 7 and dtype == "F32":
        tensors[name] = [dtype, [], values[:4]]
    else:
        tensors[name] = tensors[draw.choice(list(tensors))]


def damage_tensors(header, body, draw):
    """A well-formed file about another model."""
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = [entry["dtype"], entry["shape"], body[start:end]]
    names = list(header)
    count = draw.choice((1, 1, 2, len(names)))
    for name in draw.sample(names, count):
        damage_tensor(tensors, name, draw)
    return pack(tensors, metadata)


def damage_note(metadata, noted, draw):
    """Change one of the metadata, most often one of the `noted`, which hold JSON."""
    key = draw.choice(noted * 2 + list(metadata))
    if key in noted and draw.random() < 0.8:
        text = damage_json(json.loads(metadata[key]), draw)
        metadata[key] = text.decode("utf-8", "replace")
    else:
        metadata[key] = draw.choice(TEXTS)


def damage_header(data, draw):
    """A safetensors file whose header lies: about its own length, or about its tensors."""
    header, body = split_header(data)
    size = int.from_bytes(data[:8], "little")
    if draw.random() < 0.15:
        wrong = draw.choice((0, 1, size - 1, size + 1, size * 2, 2**31, 2**32, 2**63, 2**63 - 1,
                             2**64 - 1, 10**8 + 1))
        return wrong.to_bytes(8, "little") + data[8:]
    if draw.random() < 0.55:
        return damage_tensors(header, body, draw)
    metadata = header.get("__metadata__", {})
    # the notes that predictors and training states carry
    noted = [key for key in ("schedule", "log") if key in metadata]
    if noted and draw.random() < 0.6:
        damage_note(metadata, noted, draw)
        return prefixed(json.dumps(header).encode(), body)
    return prefixed(damage_json(header, draw), body)


def damage_body(data, draw):
    """Wrong values, a cut or an addition after an untouched header."""
    start = 8 + int.from_bytes(data[:8], "little")
    return data[:start] + damage_bytes(data[start:], draw)


def protobuf_fields(data):
    """The fields of a sentencepiece model: each a tag, a length (7 bits a byte), the bytes."""
    fields = []
    start = 0
    while start < len(data):
        end = start + 1
        size = shift = 0
        more = True
        while more:
            size |= (data[end] & 127) << shift
            more = data[end] >= 128
            shift += 7
            end += 1
        fields.append(data[start:end + size])
        start = end + size
    return fields


def damage_pieces(data, draw):
    """A sentencepiece model with fields gone, twice, exchanged or flipped inside."""
    fields = protobuf_fields(data)
    start = draw.randrange(len(fields))
    way = draw.randrange(6)
    if way == 0:
        del fields[start:start + draw.choice((1, 1, 5, 300))]
    elif way == 1:
        del fields[:start]
    elif way == 2:
        draw.shuffle(fields)
    elif way == 3:
        field = draw.choice(fields[-2:])
        fields[start:start] = [field] * draw.choice((1, 50))
    else:
        for i in draw.choice(([start], [-1], [-2], range(len(fields)))):
            inside = bytearray(fields[i])
            value = draw.randrange(256)
            inside[draw.randrange(len(inside) // 2, len(inside))] = value
            fields[i] = bytes(inside)
    return b"".join(fields)


def damage_row(data, draw):
    """One line of a JSONL file."""
    lines = data.split(b"\n")[:-1]
    i = draw.randrange(len(lines))
    way = damage_json_file if draw.random() < 0.7 else damage_bytes
    lines[i] = way(lines[i], draw)
    return draw.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines) + b"\n"


def damage_place(path, draw):
    """Something else stands where the file was."""
    path.unlink()
    way = draw.randrange(8)
    if way == 0:
        path.mkdir()
    elif way == 1:
        os.mkfifo(path)
    elif way <= 6:
        others = sorted(p.name for p in path.parent.iterdir())
        targets = ("nowhere", path.name, "/dev/zero", "..", draw.choice(others))
        path.symlink_to(targets[way - 2])
    # way 7: nothing stands there


# ----------------------------------------------------------------------------------------- cases

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SINGLE = "model.safetensors"
KINDS = {  # kind of file -> file names, ways to damage it
    "config.json": (["config.json"], [damage_json_file] * 4 + [damage_bytes]),
    "shard index": ([SINGLE + ".index.json"], [damage_json_file] * 3 + [damage_bytes]),
    "safetensors header": ([*SHARDS, SINGLE], [damage_header] * 6 + [damage_bytes]),
    "safetensors body": ([SHARDS[0], SINGLE], [damage_body]),
    "generation_config.json": (["generation_config.json"], [damage_json_file] * 2 + [damage_bytes]),
    "tokenizer.model": (["tokenizer.model"], [damage_pieces, damage_bytes]),
    "tokenizer.json": (["tokenizer.json"],
                       [damage_json_file] * 3 + [damage_lists] * 3 + [damage_bytes]),
    "tokenizer settings": (["tokenizer_config.json", "added_tokens.json"],
                           [damage_json_file] * 2 + [damage_lists] * 2 + [damage_bytes]),
    "predictors": (["predictors.safetensors"], [damage_header] * 5 + [damage_body, damage_bytes]),
    "training state": (["predictors_state.safetensors"],
                       [damage_header] * 5 + [damage_body, damage_bytes]),
    "JSONL rows": (["rows.jsonl"], [damage_row] * 4 + [damage_bytes]),
}
# which kind comes when: headers three times a round, others twice
ORDER = [*KINDS, *KINDS, "safetensors header"]


def make_case(folder, sources, seed, number):
    """Link good files into a folder and damage one of them -> kind, the file.

    The same for the same seed and number; no file (and no folder) where a source has none.
    """
    draw = random.Random(f"{seed} {number}")
    kind = ORDER[number % len(ORDER)]
    names, ways = KINDS[kind]
    there = []
    for source in sources:
        there += [source / name for name in names if (source / name).exists()]
    if not there:
        return kind, None           # no tokenizers, no tokenizer.json
    good = draw.choice(there)
    shutil.copytree(good.parent, folder, copy_function=os.link)
    path = folder / good.name
    if draw.random() < 0.06:
        damage_place(path, draw)
    else:
        way = draw.choice(ways)
        data = way(path.read_bytes(), draw)
        path.unlink()               # the good file has other links
        path.write_bytes(data)
    return kind, path


# ---------------------------------------------------------------------------------- the children

# audit events of commands, pickles and native code, whatever their arguments
EVENTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "pickle.",
          "socket.", "ctypes.dlopen", "marshal.loads")


def watch(folder, seen):
    """Note in `seen` every file that is opened outside, and every command and pickle.

    Outside is what neither belongs to the case nor is read by Python itself.
    """
    import safetensors
    inside = (str(folder), str(ROOT), sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix),
              *site.getsitepackages(), "/proc/", "/sys/", "/dev/null", "/dev/urandom")
    original = safetensors.safe_open

    def allowed(path):
        if isinstance(path, int):   # a file that is open already
            return True
        return path != "<string>" and os.path.abspath(os.fsdecode(path)).startswith(inside)

    def hook(event, args):
        if event == "open":
            wrong = not allowed(args[0])
        elif event == "exec":
            wrong = not allowed(args[0].co_filename)
        elif event == "compile":
            wrong = args[1] and not allowed(args[1])
        else:
            wrong = event.startswith(EVENTS)
        if wrong:
            seen.append(f"{event} {str(args)[:200]}")

    def safe_open(path, *more, **options):      # it opens files in Rust, where Python sees nothing
        if not allowed(path):
            seen.append(f"safe_open {path}")
        return original(path, *more, **options)

    safetensors.safe_open = safe_open
    sys.addaudithook(hook)


def limit(folder, seconds):
    """End this process in time, bound its memory, and send what it prints to files."""
    signal.alarm(seconds)           # also inside of compiled code
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 3 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for stream, name in ((1, "stdout"), (2, "stderr")):
        path = folder.parent / name
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)


def is_clear(message, folder):
    """That an error is one line and names a file, or a directory and what it lacks."""
    if "\n" in message or len(message) > 2000:
        return False
    if f"{folder}/" in message:
        return True
    # nothing is damaged: only the prompt is too long for what config.json says now
    if "beyond this model's" in message:
        return True
    known = sum((names for names, _ in KINDS.values()), [])
    return str(folder) in message and any(name in message for name in known)


def child(folder, job, seconds, say):
    """Do the job under the limits and tell in one JSON line what came of it."""
    from support.options import cli
    limit(folder, seconds)
    seen = []
    outcome, message = "works", ""
    watch(folder, seen)
    try:
        cli(job)
    except SystemExit as e:
        message = str(e)
        outcome = "clear error" if is_clear(message, folder) else "NO FILE NAMED"
    except BaseException as e:      # not only Exception: Rust's panics are none
        outcome = "OTHER EXCEPTION"
        where = traceback.extract_tb(e.__traceback__)[-1]
        message = f"{type(e).__name__}: {str(e)[:300]} ({where.filename}:{where.lineno})"
    if seen:
        outcome, message = "OUTSIDE", "; ".join(seen)
    told = {"outcome": outcome, "message": message[:2500]}
    os.write(say, json.dumps(told).encode())


def run_case(folder, job, baseline=0, seconds=SECONDS):
    """Fork, wait -> outcome, message, the child's peak memory in MB."""
    hear, say = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(hear)
            child(folder, job, seconds, say)
        finally:
            os._exit(0)
    os.close(say)
    with os.fdopen(hear) as f:
        told = f.read()
    _, status, used = os.wait4(pid, 0)
    peak = used.ru_maxrss // 1024
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        outcome = "HANG" if number == signal.SIGALRM else "CRASH"
        said = (folder.parent / "stderr").read_text(errors="replace")[-300:]
        return outcome, f"{signal.Signals(number).name}: {said}", peak
    if not told:
        return "CRASH", "it ended without a word", peak
    told = json.loads(told)
    if baseline and peak > baseline + MEGABYTES:
        above = f"{peak - baseline} MB above undamaged files"
        return "MEMORY", f"{above}; {told['message']}", peak
    return told["outcome"], told["message"], peak


def refuse():
    raise ValueError("it is broken")


def check_the_net(folder, baseline):
    """That each forbidden thing would be seen: a child that does it on purpose."""
    much = (MEGABYTES + 100) * 2**20
    wrongs = (
        ("OTHER EXCEPTION", [].pop),
        ("NO FILE NAMED", refuse),
        ("HANG", partial(time.sleep, 60)),
        ("CRASH", partial(signal.raise_signal, signal.SIGSEGV)),
        ("CRASH", partial(os._exit, 3)),
        ("MEMORY", partial(operator.mul, bytearray(b"x"), much)),
        ("OUTSIDE", partial(open, "/etc/hostname")),
        ("OUTSIDE", partial(os.system, "true")),
        ("OUTSIDE", partial(pickle.loads, pickle.dumps(Path))),
        ("OUTSIDE", partial(eval, "1")),
    )
    for outcome, job in wrongs:
        seconds = 1 if outcome == "HANG" else SECONDS
        found = run_case(folder, job, baseline, seconds)
        assert found[0] == outcome, (outcome, found)


# ---------------------------------------------------------------------------------- the campaign


def prepare(place):
    """Good files, which work, and the net, which holds -> their directories, their memory in MB."""
    with contextlib.redirect_stdout(io.StringIO()):
        sources = write_files(place / "good")
        # What Python imports and torch sets up now is shared by all children.
        for source in sources:
            use(source)
    gc.freeze()
    baseline = 0
    for resume in (False, True):
        for source in sources:
            whole = place / f"{source.name}-{resume}"
            shutil.copytree(source, whole)
            outcome, message, peak = run_case(whole, partial(use, whole, resume))
            assert outcome == "works", f"undamaged files: {outcome} {message}"
            baseline = max(baseline, peak)
    check_the_net(whole, baseline)
    return sources, baseline


def campaign(count, seed, place, show=False):
    """`count` cases -> the number of forbidden ones, each of which is printed as it comes."""
    start = time.time()
    sources, baseline = prepare(place)
    table = {kind: Counter() for kind in KINDS}
    messages = set()
    folder = place / "case"
    for number in range(count):
        kind, path = make_case(folder, sources, seed, number)
        if path is None:
            continue
        job = partial(use, folder, resume=kind == "training state")
        outcome, message, _ = run_case(folder, job, baseline)
        table[kind][outcome] += 1
        if outcome == "clear error":
            messages.add(message.replace(str(folder), "")[:60])
        if outcome in FORBIDDEN:
            print(f"FORBIDDEN: seed {seed} case {number}, {kind}, {path.name}: "
                  f"{outcome}: {message[:1500]}", flush=True)
        elif show:
            print(f"{number} {path.name}: {outcome}: {message[:300]}")
        shutil.rmtree(folder)
    together = print_table(table)
    bad = sum(together[outcome] for outcome in FORBIDDEN)
    print(f"{bad} FORBIDDEN; {len(messages)} different messages; seed {seed}, "
          f"{time.time() - start:.0f} s")
    return bad


def print_table(table):
    """{kind: {outcome: number}} -> {outcome: number} of all kinds together."""
    together = sum(table.values(), Counter())
    columns = [*ALLOWED, *(outcome for outcome in FORBIDDEN if together[outcome])]
    heads = "".join(f"{outcome:>17}" for outcome in columns)
    print(f"{'damaged file':20}{heads}{'cases':>8}")
    for kind, row in [*table.items(), ("together", together)]:
        numbers = "".join(f"{row[outcome]:17d}" for outcome in columns)
        print(f"{kind:20}{numbers}{sum(row.values()):8d}")
    return together


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="NUMBER",
                        help="run this case alone, without a fork, and leave its files")
    parser.add_argument("--show", action="store_true", help="print every case's outcome")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    torch.set_num_threads(1)        # a fork has no threads but its own
    if args.only is None:
        with tempfile.TemporaryDirectory() as place:
            bad = campaign(args.count, args.seed, Path(place), args.show)
        sys.exit(bad > 0)
    place = Path(tempfile.mkdtemp())
    kind, path = make_case(place / "case", write_files(place / "good"), args.seed, args.only)
    print(f"{kind}: {path}")
    use(place / "case", kind == "training state")


if __name__ == "__main__":
    main()
