"""Hundreds of damaged checkpoints, predictors, training states and data files: each is used as it is or refused in one clear line.

    python tests/test_mutations.py --count 2000 --seed 7        # a larger run, with its table
    python tests/test_mutations.py --seed 7 --only 123          # one case again, its files and its traceback

A case is a directory of small good files of which one is damaged: bits flipped, cut, JSON values replaced, shapes that overflow,
links, names that lead out of the directory. A child process reads all of them as the commands do and answers a prompt. Whatever it
does but these two things is FORBIDDEN: an error of another kind (a traceback of torch's), one that names no file, a hang, a crash,
more than 400 MB of memory, a file opened elsewhere, a command or a pickle run. torch is imported once; every case is a fork of that.
"""
import argparse
import collections
import contextlib
import copy
import gc
import importlib.util
import io
import json
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
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
OUTCOMES = ("works", "clear error", "OTHER EXCEPTION", "NO FILE NAMED", "HANG", "CRASH", "MEMORY", "OUTSIDE")
SECONDS, MEGABYTES = 20, 400        # what one case may take, and its memory above that of undamaged files


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads memory from /proc")
def test_damaged_files_are_used_or_refused_in_one_clear_line():
    words = [sys.executable, __file__, "--count", "600", "--seed", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------- the undamaged files


def write_files(folder):
    """A sharded checkpoint with the toy's tokenizer, its rows, predictors and the state of a training run stopped half-way; in a
    directory beside it the other layout: one file of weights and a tokenizer.json."""
    import golden
    import train
    from model import Tokenizer, load
    first, second = folder / "sharded", folder / "single"
    golden.VOCAB = 1280             # the toy tokenizer's; two layers less wide keep a case at milliseconds
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size": 1280, "max_position_embeddings": 256}
    case = {**golden.cases()["sharded"], **shape, "rope_scaling": golden.cases()["llama3"]["rope_scaling"]}
    golden.cases = lambda: {"sharded": case, "single": {**case, "tie_word_embeddings": True, "rope_scaling": None}}
    for name, place in (("sharded", first), ("single", second)):
        golden.write_checkpoint(place, name)
        with (ROOT / "checkpoints" / "toy" / "train.jsonl").open() as f:
            rows = [json.loads(line) for line, _ in zip(f, range(20))]
        rows = [{"instruction": row["instruction"][-120:], "context": None, "response": row["response"]} for row in rows]
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (place / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "add_eos_token": False, "model_max_length": 2048}))
        if name == "sharded" or not importlib.util.find_spec("tokenizers"):
            shutil.copy(ROOT / "checkpoints" / "toy" / "tokenizer.model", place)
        else:
            from tokenizers import Tokenizer as Fast, decoders, models, pre_tokenizers
            letters = sorted(pre_tokenizers.ByteLevel.alphabet())
            merges = [(a, b) for a in "aeiou" for b in "nrst"] + [("th", "e")]
            vocab = {piece: i for i, piece in enumerate(["<s>", "</s>", *letters, *(a + b for a, b in [("t", "h"), *merges])])}
            fast = Fast(models.BPE(vocab=vocab, merges=[("t", "h"), *merges]))
            fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
            fast.add_special_tokens(["<s>", "</s>"])
            fast.save(str(place / "tokenizer.json"))
        with contextlib.suppress(SystemExit):                        # a first signal is there already: it saves after step 1 and leaves
            train.train(load(place, device="cpu"), *training(place, Tokenizer(place)), stop=[signal.SIGTERM])
    return [first, second]


def training(folder, tokenizer):
    """What train.train is given besides the model."""
    import train
    from common import rows_from
    from prune import Schedule
    words = ["--ckpt", folder, "--data", folder / "rows.jsonl", "--steps", 2, "--accum", 1, "--states", "marked", "--cls", 0, "--max-response", 8]
    args = train.arguments().parse_args([*map(str, words), "--resume"])
    return rows_from(args, tokenizer, "train"), [], Schedule(1, 1, 3, 0.8), args, folder / "predictors.safetensors"


def use(folder, resume):
    """What the commands do with such files: rows, tokenizer, model and predictors, an answer of two tokens; or a resumed training."""
    import infer
    import prune
    import torch
    import train
    from model import Tokenizer, load
    tokenizer = Tokenizer(folder)
    if resume:
        return train.train(load(folder, device="cpu"), *training(folder, tokenizer))
    rows = training(folder, tokenizer)[0]
    args = SimpleNamespace(ckpt=str(folder), predictors=str(folder / "predictors.safetensors"), device="cpu", dtype=None, tp=False, scorer="prior")
    model, schedule, predictors, metadata = infer.load_pruning(args)
    scorer = prune.make_scorer("prior", model, schedule, predictors, 0, metadata["prior"])
    for text in ("What does Clara sell?\n\u6771\u4eac \U0001f642", "the " * 30):
        found = infer.generate(model, torch.tensor([tokenizer.encode(text)]), 2, schedule, scorer)
        tokenizer.decode(found.tokens), [tokenizer.piece(t) for t in found.tokens]
    infer.generate_batch(model, [row.tokens[:row.prompt_len].tolist() for row in rows[:2]], 2, schedule, scorer)


# ------------------------------------------------------------------------------------------------------------- damage

TEXTS = ["", "x" * 10000, "../../etc/passwd", "/etc/passwd", "..", ".", "sub/../x", "a\0b", "\u202e\u00e9", "\x1b[2J\n", "nan", "-1", "1e400", "9" * 5000, "F32", "I64", "BOOL",
         "F8_E4M3", "F4", "C64", "default", "llama3", "silu", "mistral", "qwen2", "model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "n" * 300, "os.system('true')"]
VALUES = [None, True, False, 0, 1, -1, 2, 3, 7, 1.5, 64.0, 1000, 2**20, 2**24, 10**9, 2**31, 2**53, 2**63, 2**64, -2**63, 10**30, 1e-300, 1e300, [], {}, [[]], {"a": {}}, [0] * 50,
          [2**32, 2**32, 2**32], [2**62, 0], [2**63], [0, 0], [-1, 4], [0, 2**63], [2**63, 0]]
RAW = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000, '"\\ud800"', '"\\u0000"', "[" * 100000, "[" * 900 + "]" * 900, '{"a":' * 50000, "01", "'a'", "tru", ""]
MARK = "@raw@"                      # stands for a piece of text that json.dumps would not write


def spots(value):
    """All (container, key) of a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [spot for k in keys for spot in [(value, k), *spots(value[k])]]


def damage_json(value, draw):
    """A JSON value -> text in which one to three places are wrong."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = spots(value)
        if not places:
            break
        inside, key = draw.choice(places)
        old, way = inside[key], draw.choice(("value", "value", "value", "text", "raw", "raw", "delete", "number", "number", "swap", "add"))
        if way == "delete":
            del inside[key]
        elif way == "swap":
            other, k = draw.choice(places)
            inside[key], other[k] = copy.deepcopy(other[k]), copy.deepcopy(old)
        elif way == "add" and isinstance(inside, dict):
            inside[draw.choice(TEXTS)] = copy.deepcopy(draw.choice(VALUES))
        elif way == "number" and type(old) in (int, float):
            inside[key] = draw.choice((old + 1, old - 1, old * 2, old // 2, -old, old * 10**9, float(old), str(old), [old]))
        else:
            inside[key] = copy.deepcopy(draw.choice({"text": TEXTS, "raw": [MARK]}.get(way, VALUES)))
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    if isinstance(value, dict) and value and draw.random() < 0.15:   # the same key twice
        again = f"{json.dumps(draw.choice(list(value)))}: {json.dumps(draw.choice(VALUES))}"
        text = draw.choice((f"{{{again}, {text[1:]}", f"{text[:-1]}, {again}}}"))
    return text.replace(json.dumps(MARK), draw.choice(RAW)).encode("utf-8", "surrogatepass")


def damage_bytes(data, draw):
    """Flipped bits, cuts, insertions, other encodings, a line of 10 MB: what disks, editors and interrupted downloads do."""
    data, way, at = bytearray(data), draw.randrange(11), draw.randrange(len(data) + 1)
    if way <= 1:
        for _ in range(draw.choice((1, 1, 3, 20, 300))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif way == 2:
        del data[at:]
    elif way == 3:
        del data[at:at + draw.choice((1, 2, 8, 100))]
    elif way == 4:
        data[at:at] = draw.choice((b"\0", b"\xff", b"\n", b'"', b"{", draw.randbytes(20), bytes(1000), b"[" * 100000))
    elif way == 5:
        data[at:at + draw.choice((1, 8, 200))] = bytes(draw.choice((1, 8, 200)))
    elif way == 6:
        data[at:at] = data[draw.randrange(len(data)):][:200]
    elif way == 7:
        data[:0] = draw.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0\0", b"\n" * 5, b"PK\3\4", b"\x80\4\x95cos\nsystem\n(S'true'\ntR."))
    elif way == 8:
        data = draw.choice((b"", b"\0", b"\n", b"null", b"{}", b"[]", b"0", b'""', b"\x80", bytes(8), b"\xff" * 8, draw.randbytes(1000), bytes(data) * 2))
    elif way == 9:
        data = data.decode("utf-8", "replace").encode(draw.choice(("utf-16", "utf-32", "latin-1")), "replace")
    else:
        data[at:at] = draw.choice((b" ", b"a", b"\0", b"9")) * 10**7
    return bytes(data)


def pack(tensors, metadata):
    """{name: [dtype, shape, bytes]} -> a safetensors file whose offsets are right, whatever the shapes."""
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())


def damage_header(data, draw):
    """A safetensors file whose header lies: about its own length, about its tensors, or well-formed and about another model."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    if draw.random() < 0.15:
        wrong = draw.choice((0, 1, size - 1, size + 1, size * 2, 2**31, 2**32, 2**63, 2**63 - 1, 2**64 - 1, 10**8 + 1))
        return wrong.to_bytes(8, "little") + data[8:]
    if draw.random() < 0.55:
        metadata, names = header.pop("__metadata__", {}), list(header)
        tensors = {k: [header[k]["dtype"], header[k]["shape"], body[slice(*header[k]["data_offsets"])]] for k in names}
        for name in draw.sample(names, draw.choice((1, 1, 2, len(names)))):
            dtype, shape, values = tensors[name]
            way = draw.randrange(9)
            if way == 0:
                del tensors[name]
            elif way == 1:
                tensors[draw.choice(TEXTS) or name + ".x"] = tensors.pop(name)
            elif way == 2:
                tensors[name] = [dtype, draw.choice((shape[::-1], [len(values) // 4], [1, *shape], [*shape, 1], [1] * 70 + shape)), values]
            elif way == 3:          # no values, and a shape of any size
                tensors[name] = [dtype, draw.choice(([0], [0, *shape], [2**40, 0], [0, 2**40], [2**62, 0], [2**31, 2**31, 0], [*shape[1:], 0])), b""]
            elif way == 4 and len(shape):
                tensors[name] = [dtype, [shape[0] * 2, *shape[1:]], values * 2]
            elif way == 5:          # the same bytes as another type
                kind, width = draw.choice((("F16", 2), ("BF16", 2), ("I32", 4), ("U8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("F8_E8M0", 1), ("F64", 8), ("C64", 8), ("U64", 8)))
                tensors[name] = [kind, shape, bytes(width * (len(values) // 4)) if dtype == "F32" else values]
            elif way == 6:
                tensors[name] = [dtype, shape, draw.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\0\0\0\0", b"\1\0\0\0")) * (len(values) // 4)]
            elif way == 7 and dtype == "F32":
                tensors[name] = [dtype, [], values[:4]]
            else:
                tensors[name] = tensors[draw.choice(list(tensors))] if tensors else [dtype, shape, values]
        return pack(tensors, metadata)
    metadata = header.get("__metadata__", {})
    inner = [k for k in ("schedule", "log") if k in metadata]
    if inner and draw.random() < 0.6:                                # the notes that predictors and training states carry
        key = draw.choice(inner * 2 + list(metadata))
        metadata[key] = damage_json(json.loads(metadata[key]), draw).decode("utf-8", "replace") if key in inner and draw.random() < 0.8 else draw.choice(TEXTS)
        text = json.dumps(header).encode()
    else:
        text = damage_json(header, draw)
    return len(text).to_bytes(8, "little") + text + body


def damage_pieces(data, draw):
    """A sentencepiece model, which is a list of protobuf fields, with some fields gone, twice, exchanged or flipped inside."""
    fields, at = [], 0
    while at < len(data):           # every field here is a tag, a length (7 bits a byte) and that many bytes
        size, end, shift = 0, at + 1, 0
        while True:
            size, shift, end = size | (data[end] & 127) << shift, shift + 7, end + 1
            if data[end - 1] < 128:
                break
        fields.append(data[at:end + size])
        at = end + size
    start, way = draw.randrange(len(fields)), draw.randrange(6)
    if way == 0:
        del fields[start:start + draw.choice((1, 1, 5, 300))]
    elif way == 1:
        del fields[:start]
    elif way == 2:
        draw.shuffle(fields)
    elif way == 3:
        fields[start:start] = [draw.choice(fields[-2:])] * draw.choice((1, 50))
    else:
        for i in draw.choice(([start], [-1], [-2], range(len(fields)))):
            inside = bytearray(fields[i])
            inside[draw.randrange(len(inside) // 2, len(inside))] = draw.randrange(256)
            fields[i] = bytes(inside)
    return b"".join(fields)


def damage_body(data, draw):
    """Wrong values, a cut or an addition after an untouched header."""
    start = 8 + int.from_bytes(data[:8], "little")
    return data[:start] + damage_bytes(data[start:], draw)


def damage_row(data, draw):
    """One line of a JSONL file."""
    lines = data.split(b"\n")[:-1]
    i = draw.randrange(len(lines))
    lines[i] = damage_json(json.loads(lines[i]), draw) if draw.random() < 0.7 else damage_bytes(lines[i], draw)
    return draw.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines) + b"\n"


def damage_place(path, draw):
    """Something else stands where the file was."""
    path.unlink()
    way = draw.randrange(8)
    if way == 0:
        path.mkdir()
    elif way == 1:
        os.mkfifo(path)
    elif way <= 6:                  # 7: nothing
        others = sorted(p.name for p in path.parent.iterdir())
        path.symlink_to(("nowhere", path.name, "/dev/zero", "..", draw.choice(others))[way - 2])


KINDS = {  # kind of file -> file names, ways to damage it
    "config.json": (["config.json"], [lambda data, draw: damage_json(json.loads(data), draw)] * 4 + [damage_bytes]),
    "shard index": (["model.safetensors.index.json"], [lambda data, draw: damage_json(json.loads(data), draw)] * 3 + [damage_bytes]),
    "safetensors header": (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors"], [damage_header] * 6 + [damage_bytes]),
    "safetensors body": (["model-00001-of-00002.safetensors", "model.safetensors"], [damage_body]),
    "tokenizer.model": (["tokenizer.model"], [damage_pieces, damage_bytes]),
    "tokenizer.json": (["tokenizer.json"], [lambda data, draw: damage_json(json.loads(data), draw)] * 3 + [damage_bytes]),
    "tokenizer settings": (["tokenizer_config.json"], [lambda data, draw: damage_json(json.loads(data), draw)] * 2 + [damage_bytes]),
    "predictors": (["predictors.safetensors"], [damage_header] * 5 + [damage_body, damage_bytes]),
    "training state": (["train_state.safetensors"], [damage_header] * 5 + [damage_body, damage_bytes]),
    "JSONL rows": (["rows.jsonl"], [damage_row] * 4 + [damage_bytes]),
}
ORDER = [*KINDS, *(kind for kind in KINDS if kind != "tokenizer settings"), "safetensors header"]       # which kind is next: most is done with the header


def make_case(folder, sources, seed, number):
    """Link good files into a folder and damage one of them -> kind, the file; the same for the same seed and number."""
    draw = random.Random(f"{seed} {number}")
    kind = ORDER[number % len(ORDER)]
    names, ways = KINDS[kind]
    source, name = draw.choice([(s, n) for s in sources for n in names if (s / n).exists()] or [(None, None)])
    if not source:
        return kind, None           # no tokenizers, no tokenizer.json
    shutil.copytree(source, folder, copy_function=os.link)
    path = folder / name
    if draw.random() < 0.06:
        damage_place(path, draw)
    else:
        data = draw.choice(ways)(path.read_bytes(), draw)
        path.unlink()               # the good file has other links
        path.write_bytes(data)
    return kind, path


# -------------------------------------------------------------------------------------------------------- the children


def watch(folder, seen):
    """Note in `seen` every file that is opened outside of the case and of what Python itself reads, and every command and pickle."""
    import safetensors
    inside = [str(folder), str(ROOT), sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), *site.getsitepackages(), "/proc/", "/sys/", "/dev/null", "/dev/urandom"]
    original = safetensors.safe_open

    def allowed(path):
        return isinstance(path, int) or path != "<string>" and os.path.abspath(os.fsdecode(path)).startswith(tuple(inside))

    def hook(event, args):
        if event == "open" and not allowed(args[0]) or event == "exec" and not allowed(args[0].co_filename) or event == "compile" and args[1] and not allowed(args[1]) \
                or event.startswith(("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "pickle.", "socket.", "ctypes.dlopen", "marshal.loads")):
            seen.append(f"{event} {str(args)[:200]}")

    def safe_open(path, *more, **options):                           # it opens files in Rust, where Python sees nothing
        if not allowed(path):
            seen.append(f"safe_open {path}")
        return original(path, *more, **options)
    safetensors.safe_open = safe_open
    sys.addaudithook(hook)


def child(folder, path, resume, say):
    """Use the files under the limits and tell in one JSON line what came of it."""
    import common
    signal.alarm(SECONDS)           # ends the process, also inside of compiled code
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + 3 * 2**30,) * 2)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    seen, outcome, message = [], "works", ""
    watch(folder, seen)
    try:
        common.cli(lambda: use(folder, resume))
    except SystemExit as e:
        outcome, message = "clear error", str(e)
        # a file is named, or what a directory lacks; or nothing is damaged, only the prompt is too long for what config.json says now
        names = [name for names, _ in KINDS.values() for name in names]
        named = f"{folder}/" in message or str(folder) in message and any(name in message for name in names) or "beyond this model's" in message
        if not named or "\n" in message or len(message) > 2000:
            outcome = "NO FILE NAMED"
    except BaseException as e:      # not only Exception: Rust's panics are none
        where = traceback.extract_tb(e.__traceback__)[-1]
        outcome, message = "OTHER EXCEPTION", f"{type(e).__name__}: {str(e)[:300]} ({where.filename}:{where.lineno})"
    if seen:
        outcome, message = "OUTSIDE", "; ".join(seen)
    os.write(say, json.dumps({"outcome": outcome, "message": message[:2500]}).encode())


def run_case(folder, path, resume, baseline=0):
    """Fork, wait -> outcome, message, the child's peak memory in MB."""
    hear, say = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(hear)
            child(folder, path, resume, say)
        finally:
            os._exit(0)
    os.close(say)
    with os.fdopen(hear) as f:
        told = f.read()
    _, status, used = os.wait4(pid, 0)
    peak = used.ru_maxrss // 1024
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return ("HANG" if number == signal.SIGALRM else "CRASH"), signal.Signals(number).name + ": " + (folder.parent / "stderr").read_text(errors="replace")[-300:], peak
    if not told:
        return "CRASH", "it ended without a word", peak
    told = json.loads(told)
    if baseline and peak > baseline + MEGABYTES:
        return "MEMORY", f"{peak - baseline} MB above undamaged files; {told['message']}", peak
    return told["outcome"], told["message"], peak


def check_the_net(folder, baseline):
    """That each forbidden thing would be seen: a child that does it on purpose."""
    global use, SECONDS
    honest, seconds = use, SECONDS

    def refuse(text):
        raise ValueError(text)
    wrongs = {"OTHER EXCEPTION": [lambda *_: [][0]], "NO FILE NAMED": [lambda *_: refuse("it is broken")],
              "HANG": [lambda *_: time.sleep(60)], "CRASH": [lambda *_: os.kill(os.getpid(), signal.SIGSEGV), lambda *_: os._exit(3)],
              "MEMORY": [lambda *_: bytearray(b"x") * (MEGABYTES + 100 << 20)],
              "OUTSIDE": [lambda *_: open("/etc/hostname"), lambda *_: os.system("true"), lambda *_: pickle.loads(pickle.dumps(Path)), lambda *_: eval("1")]}
    for outcome, ways in wrongs.items():
        SECONDS = 1 if outcome == "HANG" else seconds
        for use in ways:
            found = run_case(folder, folder, False, baseline)
            assert found[0] == outcome, (outcome, found)
    use, SECONDS = honest, seconds


def campaign(count, seed, place, show=False):
    """`count` cases -> {kind: {outcome: number}}; what is forbidden is printed as it comes."""
    start, table = time.time(), {kind: collections.Counter() for kind in KINDS}
    with contextlib.redirect_stdout(io.StringIO()):
        sources = write_files(place / "good")
        for source in sources:      # what Python imports and torch sets up is shared by all children
            use(source, False)
    gc.freeze()
    baseline = 0
    for number, source in enumerate(sources * 2):                    # half of them resume a training
        shutil.copytree(source, place / f"whole{number}")
        outcome, message, peak = run_case(place / f"whole{number}", source, number >= 2)
        assert outcome == "works", f"undamaged files: {outcome} {message}"
        baseline = max(baseline, peak)
    check_the_net(place / "whole0", baseline)
    messages = collections.Counter()
    for number in range(count):
        folder = place / "case"
        kind, path = make_case(folder, sources, seed, number)
        if path:
            outcome, message, _ = run_case(folder, path, kind == "training state", baseline)
            table[kind][outcome] += 1
            messages[message.replace(str(folder), "")[:60]] += outcome == "clear error"
            if outcome not in OUTCOMES[:2]:
                print(f"FORBIDDEN: seed {seed} case {number}, {kind}, {path.name}: {outcome}: {message[:1500]}", flush=True)
            elif show:
                print(f"{number} {path.name}: {outcome}: {message[:300]}")
            shutil.rmtree(folder)
    columns = [o for i, o in enumerate(OUTCOMES) if i < 2 or any(row[o] for row in table.values())]
    print(f"{'damaged file':20}" + "".join(f"{o:>17}" for o in columns) + f"{'cases':>8}")
    for kind, row in table.items():
        print(f"{kind:20}" + "".join(f"{row[o]:17d}" for o in columns) + f"{sum(row.values()):8d}")
    total = sum(table.values(), collections.Counter())
    bad = sum(n for o, n in total.items() if o not in OUTCOMES[:2])
    print(f"{'together':20}" + "".join(f"{total[o]:17d}" for o in columns) + f"{sum(total.values()):8d}")
    print(f"{bad} FORBIDDEN; {len(messages)} different messages; seed {seed}, {time.time() - start:.0f} s")
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run this case alone, without a fork, and leave its files")
    parser.add_argument("--show", action="store_true", help="print every case's outcome")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    torch.set_num_threads(1)        # a fork has no threads but its own
    if args.only is None:
        with tempfile.TemporaryDirectory() as place:
            sys.exit(campaign(args.count, args.seed, Path(place), args.show) > 0)
    place = Path(tempfile.mkdtemp())
    kind, path = make_case(place / "case", write_files(place / "good"), args.seed, args.only)
    print(f"{kind}: {path}")
    use(place / "case", kind == "training state")


if __name__ == "__main__":
    main()
