"""The way from a checkpoint as it comes to a pruned answer, and every wrong turn on it.

    python tests/test_commands.py       # the table of wrong inputs for docs/commands.md, with times
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import forked
from conftest import ROOT, TOY, anew

DOLLY = "databricks-dolly-15k.jsonl"
# Llama-2-7b-hf's config.json, its sizes made small; 32 blocks as there.
LLAMA2 = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1,
          "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
          "intermediate_size": 88, "max_position_embeddings": 4096, "num_attention_heads": 4,
          "num_hidden_layers": 32, "num_key_value_heads": 4, "pretraining_tp": 1,
          "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
          "torch_dtype": "float16", "use_cache": True}


def llama2(folder):
    """A shrunken Llama-2 as the Hub has it: two shards and their index, the toy's tokenizer."""
    folder.mkdir(parents=True)
    words = json.loads((TOY / "config.json").read_text())["vocab_size"]
    config = LLAMA2 | {"vocab_size": words}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(TOY / "tokenizer.model", folder)
    generator = torch.Generator().manual_seed(0)
    halves, places = ({}, {}), {}
    for name, shape in tensors_of(config):
        half = "layers.1" in name or "layers.2" in name
        ones = len(shape) == 1
        w = torch.ones(shape) if ones else 0.1 * torch.randn(shape, generator=generator)
        halves[half][name] = w.half()
        places[name] = f"model-0000{half + 1}-of-00002.safetensors"
    for half, state in enumerate(halves):
        save_file(state, folder / f"model-0000{half + 1}-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tensors_of(c):
    """Names and shapes of a Llama's tensors."""
    dim, ffn, words = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    yield "model.embed_tokens.weight", (words, dim)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for part in "qkvo":
            yield f"{layer}.self_attn.{part}_proj.weight", (dim, dim)
        yield f"{layer}.mlp.gate_proj.weight", (ffn, dim)
        yield f"{layer}.mlp.up_proj.weight", (ffn, dim)
        yield f"{layer}.mlp.down_proj.weight", (dim, ffn)
        yield f"{layer}.input_layernorm.weight", (dim,)
        yield f"{layer}.post_attention_layernorm.weight", (dim,)
    yield "model.norm.weight", (dim,)
    yield "lm_head.weight", (words, dim)


def typed(line, folder, run=forked.run, env=os.environ):
    """A command as it is typed, in a folder -> exit code, stdout, stderr."""
    python, *words = line.split()
    assert python == "python"
    if words[0] == "-m":
        env = {**env, "PYTHONPATH": str(ROOT)}
    else:
        words[0] = str(ROOT / words[0])
    return run(words, folder, env=env)


# --------------------------------------------------------------------------------- the way through


def clone(folder):
    """A folder with the shrunken Llama-2 in llama-7b, and Dolly in data/."""
    llama2(folder / "llama-7b")
    filler = "The fog covered the quiet drums. " * 12
    rows = [{"instruction": "What does Anna sell?", "category": "closed_qa",
             "context": f"{filler}Anna sells {number} maps.",
             "response": f"Anna sells {number} maps."} for number in range(30)]
    (folder / "data").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / DOLLY).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.beside
def test_from_a_checkpoint_to_a_pruned_answer_in_three_commands(tmp_path):
    """No option has to be looked up: each command says the next."""
    folder = clone(tmp_path)
    code, _, err = typed("python infer.py --ckpt ./llama-7b", folder)
    assert code == 1 and len(err.splitlines()) == 1
    assert "`python train.py --ckpt ./llama-7b` trains them" in err
    assert "--scorer earliest" in err

    code, out, err = typed("python infer.py --ckpt ./llama-7b --scorer earliest --max-new-tokens 2",
                           folder)
    assert code == 0, err
    assert 'right "In the school' in out

    code, out, err = typed("python train.py --ckpt ./llama-7b --steps 2 --report-rows 2", folder)
    assert code == 0, err
    assert out.startswith(f"model llama-7b; rows data/{DOLLY}; template plain (it has no chat")
    assert "2 steps of 4 rows, 10 stages after blocks [4, 7, 10, 13, 16, 19, 22, 25, 28, 31]" in out
    wrote = re.search(r"^wrote (\S+) after \d+ s; next: (.*)$", out, re.MULTILINE)
    assert wrote[1] == "out/llama-7b/predictors.safetensors"

    code, out, err = typed(f"{wrote[2]} --max-new-tokens 2", folder)
    assert code == 0, err
    assert f"predictors {wrote[1]}; template plain (the predictors were trained with it)" in out
    assert "65% dropped by the last stage" in out

    line = f"python -m lab.quality --ckpt ./llama-7b --data data/{DOLLY} --limit 1"
    code, out, err = typed(line, folder)
    assert code == 0, err
    assert f"predictors {wrote[1]}" in out


@pytest.mark.beside
def test_a_stopped_run_is_not_overwritten(tmp_path):
    folder = clone(tmp_path)
    line = ("python train.py --ckpt ./llama-7b --out stopped --steps 5000 --accum 1 "
            "--save-every 0.1 --report-rows 0")
    words = line.split()[2:]
    run = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], cwd=folder,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    state = folder / "stopped" / "predictors_state.safetensors"
    deadline = time.time() + 120
    while not state.is_file() and time.time() < deadline:
        time.sleep(0.1)
    run.kill()
    run.communicate()
    before = state.read_bytes()
    code, _, err = typed(line, folder)
    assert code == 1 and len(err.splitlines()) == 1
    assert re.search(r"a run stopped at step \d+ of 5000 is here: --resume goes on, --restart", err)
    code, _, err = typed(f"{line} --lr 0.01 --resume", folder)
    assert code == 1 and "a run with another recipe" in err
    code, _, err = typed(f"{line} --limit 7 --resume", folder)
    assert code == 1 and "a run with other rows" in err
    assert state.read_bytes() == before
    code, out, _ = typed("python infer.py --ckpt ./llama-7b --predictors stopped", folder)
    assert code == 0 and re.search(r"predictors stopped/\S+ \(stopped at step \d+ of 5000\)", out)
    code, out, err = typed(f"{line.replace('5000', '1')} --restart", folder)
    assert code == 0, err
    code, _, err = typed(line.replace("5000", "1"), folder)
    assert code == 1 and "a finished run of 1 steps is here: --restart begins anew" in err


def test_a_mistyped_name_is_told_the_right_one():
    from support.places import find
    for text in ("Toy", "checkpoint/toy", "toyy"):
        with pytest.raises(FileNotFoundError, match="do you mean --ckpt toy"):
            find(text)


def test_predictors_may_be_named_by_their_folder():
    from support.places import predictors_file
    assert predictors_file("toy", str(TOY)) == TOY / "predictors.safetensors"
    assert predictors_file("toy", "x.safetensors") == Path("x.safetensors")


# ---------------------------------------------------------------------------------- the wrong turns

INFER, TRAIN = "python infer.py", "python train.py"
WRONG = [       # what is wrong, the command, what its line says (a part of it)
    ("a Hub id that is not on this disk", f"{INFER} --ckpt meta-llama/Llama-2-7b-hf",
     "`hf download meta-llama/Llama-2-7b-hf` gets it"),
    ("pickled weights alone", f"{INFER} --ckpt pickled --scorer earliest",
     "pickled holds no safetensors but *.bin or *.pth"),
    ("a GGUF file", f"{INFER} --ckpt tiny.gguf",
     "`python checkpoints/gguf.py tiny.gguf --out checkpoints/tiny` converts it"),
    ("one shard of two", f"{INFER} --ckpt half --scorer earliest",
     "of 2 shards 1 are missing: model-00002-of-00002.safetensors"),
    ("a shard, not its directory", f"{INFER} --ckpt half/model-00001-of-00002.safetensors",
     "a checkpoint is the directory that holds it"),
    ("a directory without config.json", f"{INFER} --ckpt empty", "empty has no config.json"),
    ("a name that nothing has", f"{INFER} --ckpt qwen2.5-coder-1.5b-x",
     "no checkpoint 'qwen2.5-coder-1.5b-x'"),
    ("Llama before it was downloaded", f"{TRAIN} --ckpt llama-3-8b",
     "get it with `hf download meta-llama/Meta-Llama-3-8B --local-dir checkpoints/llama-3-8b`"),
    ("no rows to train on", f"{TRAIN} --ckpt llama",
     f"{DOLLY} is not here: `hf download databricks/databricks-dolly-15k --repo-type dataset"),
    ("a data file that is not there", f"{TRAIN} --ckpt llama --data rows.jsonl",
     "rows.jsonl: no such data file"),
    ("a data file with a broken line", f"{TRAIN} --ckpt llama --data broken.jsonl",
     "broken.jsonl, line 2: not valid JSON"),
    ("no predictors yet", f"{INFER} --ckpt llama", "`python train.py --ckpt llama` trains them"),
    ("predictors of another model", f"{INFER} --ckpt llama --predictors {TOY}",
     "made for another model"),
    ("predictors that are not there", f"{INFER} --predictors none", "none: no such file"),
    ("stages elsewhere", f"{INFER} --first 3", "predictors stand after blocks"),
    ("a prompt file that is not there", f"{INFER} --prompt-file report.txt",
     "report.txt: no such prompt file"),
    ("a prompt file in Latin-1", f"{INFER} --prompt-file latin1.txt", "latin1.txt: not UTF-8 text"),
    ("an empty prompt", f"{INFER} --prompt-file empty.txt", "empty.txt: the prompt is empty"),
    ("two prompts", f"{INFER} --prompt hi --prompt-file empty.txt", "leave all but one out"),
    ("a prompt that is too long", f"{INFER} --prompt-file long.txt",
     "beyond this model's 2048 positions"),
    ("too many new tokens", f"{INFER} --prompt hi --max-new-tokens 5000",
     "beyond this model's 2048 positions"),
    ("a system text without a place", f"{INFER} --prompt hi --system be",
     "has no place for a system text"),
    ("random weights asked for an answer", f"{INFER} --ckpt random:mistral-7b",
     "random weights have nothing to say: use --bench"),
    ("random weights to train on", f"{TRAIN} --ckpt random:mistral-7b",
     "random weights are for timings"),
    ("a model larger than the memory", f"{INFER} --ckpt random:llama-3-70b --bench 128",
     "billion weights need 282.2 GB in float32"),
    ("a page that cannot be written", f"{INFER} --html none/page.html", "none/page.html"),
    ("a device that is not there", f"{INFER} --device warp", "device 'warp' is not available here"),
]


def wrong_turns(folder):
    """A folder in which every command of WRONG is wrong."""
    llama2(folder / "llama")
    shutil.copytree(folder / "llama", folder / "half")
    (folder / "half" / "model-00002-of-00002.safetensors").unlink()
    shutil.copytree(folder / "llama", folder / "pickled")
    for file in (folder / "pickled").glob("model*"):
        file.unlink()
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"PK")
    (folder / "empty").mkdir()
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    (folder / "latin1.txt").write_bytes("Käse".encode("latin-1"))
    (folder / "empty.txt").write_text("\n")
    (folder / "long.txt").write_text("the " * 3000)
    (folder / "broken.jsonl").write_text('{"instruction": "a", "response": "b"}\n{"instr')
    return folder


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    return wrong_turns(tmp_path_factory.mktemp("wrong") / "there")


@pytest.mark.parametrize("what, line, says", WRONG, ids=[what for what, _, _ in WRONG])
def test_a_wrong_input_ends_in_one_line_at_once(what, line, says, wrong, leaves, monkeypatch,
                                                capsys):
    """Before any weights are read: nothing is said of reading them."""
    if "llama-3-8b" in line and (ROOT / "checkpoints" / "llama-3-8b").exists():
        pytest.skip("it was downloaded")
    monkeypatch.chdir(wrong)
    monkeypatch.setenv("HF_HOME", str(wrong / "hub"))
    begin = time.time()
    ended = leaves(*line.split()[1:])
    assert isinstance(ended, str), ended
    assert says in ended, ended
    assert len(ended.splitlines()) == 1
    assert time.time() - begin < 5
    assert "random" in line or "reading" not in capsys.readouterr().err


def test_a_models_place_in_the_hubs_cache_is_found(wrong, monkeypatch):
    from support.places import find, rows_at_hand
    monkeypatch.setenv("HF_HOME", str(wrong / "hub"))
    monkeypatch.chdir(wrong)
    cache = wrong / "hub" / "hub"
    for name in ("models--meta-llama--Small", "datasets--databricks--databricks-dolly-15k"):
        repository = cache / name
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0123abcd")
        (repository / "snapshots").mkdir()
    model = cache / "models--meta-llama--Small" / "snapshots" / "0123abcd"
    shutil.copytree(wrong / "llama", model)
    assert find("meta-llama/Small") == model
    rows = cache / "datasets--databricks--databricks-dolly-15k" / "snapshots" / "0123abcd"
    rows.mkdir()
    (rows / DOLLY).write_text("{}")
    assert rows_at_hand("meta-llama/Small") == rows / DOLLY
    shutil.rmtree(cache)


def test_a_name_is_looked_for_under_checkpoints_first(tmp_path, monkeypatch):
    from support.places import find
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TOY, tmp_path / "toy")
    assert find("toy") == TOY
    assert find("./toy") == Path("toy")


def test_a_prompt_file_may_begin_with_a_byte_order_mark_or_be_stdin(tmp_path, monkeypatch):
    from io import BytesIO, TextIOWrapper
    from support.prompts import read_prompt
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffWer?\n".encode())
    assert read_prompt(file) == "Wer?\n"
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO("Käse".encode())))
    assert read_prompt("-") == "Käse"


# ------------------------------------------------------------------------------------- the document


def test_the_documents_table_is_what_the_commands_say():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for what, line, says in WRONG:
        line = line.replace(str(TOY), "checkpoints/toy")
        row = next((row for row in text.splitlines() if row.startswith(f"| {what} |")), "")
        assert f"`{line}`" in row and says.replace("`", "") in row.replace("`", ""), what


def table():
    """The rows of WRONG as Markdown, each command run by itself."""
    print("| what is wrong | command | what it says | seconds |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        wrong_turns(Path(folder) / "there")
        for what, line, _ in WRONG:
            begin = time.time()
            env = {**os.environ, "HF_HOME": folder}
            _, _, err = typed(line, Path(folder) / "there", anew, env)
            spent, err = time.time() - begin, err.strip().split(": ", 1)[1]
            line, err = (text.replace(str(TOY), "checkpoints/toy") for text in (line, err))
            print(f"| {what} | `{line}` | {err.replace('|', '/')} | {spent:.1f} |", flush=True)


if __name__ == "__main__":
    table()
