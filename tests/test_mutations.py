"""Damaged files: each is used as it is, or refused in one line that names the file.

A case is a folder of small good files (a checkpoint, predictors, the state of a training that was
stopped half-way, rows) of which one is damaged: bits flipped, cut off, JSON values replaced. All of
them are read as the commands do, a prompt is answered and the training resumed. Errors of another
kind would be a traceback for the user; a hang ends in one here.
"""
import copy
import json
import random
import re
import shutil
import signal

import pytest
import torch

import golden
import train
from conftest import TOY, load_cpu
from infer import generate
from model import Tokenizer
from prune import Schedule, load_predictors, predictor_scorer
from support.chat import choose_chat
from support.files import load_tensors, save_tensors
from support.rows import examples

FILES = ["config.json", "generation_config.json", "model.safetensors.index.json",
         "model-00001-of-00002.safetensors", "predictors.safetensors",
         "predictors_state.safetensors", "rows.jsonl", "tokenizer.model", "tokenizer.json",
         "tokenizer_config.json", "added_tokens.json"]
SEEDS = range(12)                    # change it and there are others
VALUES = [
    None, True, 0, 1, -1, 64.0, 1000, 2**24, 2**31, 2**63, -2**63, 10**30, 1e-300,
    float("nan"), float("inf"), [], {}, {"a": {}}, [0] * 50, [2**62, 0], [-1, 4], [0, 2**63],
    "", "x" * 10000, "../../etc/passwd", "a\0b", "\ud800", "\x1b[2J\n", "nan", "9" * 5000, "I64",
    "BOOL", "F8_E4M3", "llama3", "mistral", "{% for x in %}", "{{ 1 / 0 }}", "config.json"]


# --------------------------------------------------------------------------- the undamaged files


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of good files, with the toy's tokenizer; its training stopped after step 1 of 2."""
    known = golden.cases()
    case = {**known["sharded"], "rope_scaling": known["llama3"]["rope_scaling"], "vocab_size": 1284,
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    folder = golden.write_checkpoint(tmp_path_factory.mktemp("good"), "sharded", case=case)
    shutil.copy(TOY / "tokenizer.model", folder)
    with (folder / "rows.jsonl").open("w") as file:
        for line in (TOY / "train.jsonl").read_text().splitlines()[:20]:
            row = json.loads(line)
            row = {**row, "instruction": row["instruction"][-120:], "context": None}
            file.write(json.dumps(row) + "\n")
    for name, value in {
            "generation_config.json": {"eos_token_id": [2, 5]},
            "added_tokens.json": {"<|im_start|>": 1280, "<|im_end|>": 1281},
            "tokenizer_config.json": {
                "add_bos_token": True, "tokenizer_class": "LlamaTokenizer",
                "eos_token": {"content": "</s>"}, "chat_template":
                    "<|im_start|>{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>"},
    }.items():
        (folder / name).write_text(json.dumps(value))
    with pytest.raises(KeyboardInterrupt):
        resume(folder, load_cpu(folder), rows_of(folder, Tokenizer(folder)), stop=[15])
    return folder


def write_tokenizer_json(path):
    """Bytes, an added token, and the padding of some training."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    made.add_special_tokens(["<|im_start|>"])
    made.enable_padding(length=8)
    made.save(str(path))


def rows_of(folder, tokenizer):
    return examples(tokenizer, folder / "rows.jsonl", "train", choose_chat(folder), max_response=8,
                    max_positions=512)


def resume(folder, model, rows, **options):
    recipe = train.Recipe(cls=0.0, states="marked", steps=2, accum=1)
    train.fit(model, rows, Schedule(1, 1, 3, 0.8), recipe, folder / "predictors.safetensors",
              resume=True, **options)


def use(folder):
    """What the commands do with such files."""
    tokenizer, model = Tokenizer(folder), load_cpu(folder)
    rows = rows_of(folder, tokenizer)
    predictors, metadata = load_predictors(folder, model)
    schedule, scorer = Schedule(**metadata["schedule"]), predictor_scorer(predictors)
    said = generate(model, rows[0].tokens[None], 2, schedule, scorer).tokens
    tokenizer.decode(said)
    tokenizer.pieces(said)
    resume(folder, model, rows)


# ---------------------------------------------------------------------------------------- damage


def spots(value):
    """All (container, key) of a JSON value."""
    if not isinstance(value, (dict, list)):
        return []
    keys = value if isinstance(value, dict) else range(len(value))
    return [(value, key) for key in keys] + [spot for key in keys for spot in spots(value[key])]


def damage_json(text, draw):
    """One to three values of a JSON text become others, or are gone."""
    value = json.loads(text)
    for _ in range(draw.choice((1, 1, 3))):
        places = spots(value)
        if not places:
            break
        inside, key = draw.choice(places)
        old, new = inside[key], copy.deepcopy(draw.choice(VALUES))
        if type(old) in (int, float) and draw.random() < 0.5:
            new = draw.choice((old + 1, -old, old * 2, old * 10**9, str(old)))
        inside[key] = new
        if draw.random() < 0.1:
            del inside[key]
    return json.dumps(value).encode()


def damage_tensors(path, draw):
    """A safetensors file that is whole, but about something else: one tensor or note in it is."""
    tensors, notes = load_tensors(path)
    part = draw.choice((tensors, notes))
    name = draw.choice(sorted(part))
    old = part.pop(name)
    if part is notes:
        text = json.dumps(draw.choice(VALUES))
        notes[name] = damage_json(old, draw).decode() if old[0] in "{[" else text
    else:
        tensors |= draw.choice(({}, {name: old * torch.nan}, {name: old.to(torch.int8)},
                                {name: old[None]}, {name: torch.empty(2**40, 0)}, {"x": old}))
    save_tensors(path, tensors, notes)


def damage(path, draw):
    """Make a file another one."""
    data, way = bytearray(path.read_bytes()), draw.randrange(8)
    if way == 0:
        del data[draw.randrange(len(data)):]
    elif way == 1 or path.suffix == ".model":
        for _ in range(draw.choice((1, 3, 300))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif path.suffix == ".safetensors":
        return damage_tensors(path, draw)
    elif path.suffix == ".jsonl":
        line = draw.choice(data.splitlines()[:18])
        data = data.replace(line, damage_json(line, draw))
    else:
        data = damage_json(data, draw)
    path.write_bytes(data)


def hang(*_):
    raise AssertionError("it hangs")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_used_or_refused_in_one_line(file, seed, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "case")
    path = folder / file
    if file == "tokenizer.json":
        write_tokenizer_json(path)
    damage(path, random.Random(f"{file} {seed}"))
    before = signal.signal(signal.SIGVTALRM, hang)
    signal.setitimer(signal.ITIMER_VIRTUAL, 20)                     # seconds of this process
    try:
        use(folder)
    except (ValueError, OSError, ImportError) as e:
        # a model that can still be read may say so itself
        assert re.search(f"{folder}|this model's|not finite", str(e))
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_the_undamaged_files_work(good, tmp_path):
    use(shutil.copytree(good, tmp_path / "case"))
