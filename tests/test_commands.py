"""The way from a checkpoint as it comes to a pruned answer, and every wrong turn on it."""
import re
import shutil

import pytest

import forked
import golden
from conftest import ROOT, TOY, jsonl
from support.options import read_text
from support.rows import rows_at_hand
from support.weights import find

DOLLY = "databricks-dolly-15k.jsonl"


def llama2(folder):
    """A shrunken Llama-2 as the Hub has it: two shards and their index, the toy's tokenizer."""
    sizes = {"num_hidden_layers": 32, "vocab_size": 1280, "max_position_embeddings": 4096}
    golden.write_checkpoint(folder, "sharded", case=golden.BASE | sizes)
    shutil.copy(TOY / "tokenizer.model", folder)


def typed(line, folder):
    """A command as it is typed, in a folder -> exit code, stdout, stderr."""
    python, *words = line.split()
    assert python == "python"
    words[0] = str(ROOT / words[0])
    return forked.run(words, folder)


# --------------------------------------------------------------------------------- the way through


@pytest.mark.beside
def test_from_a_checkpoint_to_a_pruned_answer_in_three_commands(tmp_path):
    """No option has to be looked up: each command says the next."""
    folder, filler = tmp_path, "The fog covered the quiet drums. " * 12
    llama2(folder / "llama-7b")
    rows = [{"instruction": "What does Anna sell?", "category": "closed_qa",
             "context": f"{filler}Anna sells {number} maps.",
             "response": f"Anna sells {number} maps."} for number in range(30)]
    (folder / "data").mkdir()
    jsonl(folder / "data" / DOLLY, rows)
    code, _, err = typed("python infer.py --ckpt ./llama-7b", folder)
    assert code == 1 and len(err.splitlines()) == 1
    assert f"`python {ROOT}/train.py --ckpt ./llama-7b` trains them" in err

    code, out, err = typed("python train.py --ckpt ./llama-7b --steps 2 --report-rows 2", folder)
    assert code == 0, err
    assert out.startswith(f"model llama-7b; rows data/{DOLLY}; template plain (")
    assert "2 steps of 4 rows, 10 stages, keep 0.9" in out
    wrote = re.search(r"^wrote (\S+) after \d+ s; next: (.*)$", out, re.MULTILINE)
    assert wrote[1] == "out/llama-7b/predictors.safetensors"

    code, out, err = typed(f"{wrote[2]} --max-new-tokens 2 --repeats 1", folder)
    assert code == 0, err
    assert f"predictors {wrote[1]}; template plain (" in out
    assert "65% dropped by the last stage" in out

    code, _, err = typed("python train.py --ckpt ./llama-7b --steps 2", folder)
    assert code == 1 and "2 of 2 steps done is here: --resume goes on" in err
    words = "python train.py --ckpt ./llama-7b --steps 2 --lr 0.01 --resume"
    assert "a run with another recipe" in typed(words, folder)[2]


# ---------------------------------------------------------------------------------- the wrong turns

INFER, TRAIN = "python infer.py", "python train.py"
WRONG = {       # what is wrong: the command, what its line says (a part of it)
    "a Hub id that is not on this disk": (f"{INFER} --ckpt meta-llama/Llama-2-7b-hf",
                                          "`hf download OWNER/NAME"),
    "pickled weights alone": (f"{INFER} --ckpt pickled --predictors toy.safetensors "
                              "--template plain",
                              "holds pytorch_model.bin and no safetensors"),
    "a GGUF file": (f"{INFER} --ckpt tiny.gguf", "`python checkpoints/convert.py tiny.gguf --out "
                                                 "checkpoints/tiny` converts it"),
    "one shard of two": (f"{TRAIN} --ckpt half --data rows.jsonl --out o",
                         "of 2 shards 1 are missing: model-00002-of-00002.safetensors"),
    "a shard, not its directory": (f"{INFER} --ckpt half/model-00001-of-00002.safetensors",
                                   "a checkpoint is the directory that holds it"),
    "a directory without config.json": (f"{INFER} --ckpt empty", "empty has no config.json"),
    "a name that nothing has": (f"{INFER} --ckpt qwen2.5-coder-1.5b-x",
                                "no checkpoint 'qwen2.5-coder-1.5b-x'"),
    "a mistyped name": (f"{INFER} --ckpt Toy", "do you mean --ckpt toy"),
    "Llama before it was downloaded": (f"{TRAIN} --ckpt new/llama-3-8b", "get it with `hf download "
                                       "meta-llama/Meta-Llama-3-8B --local-dir"),
    "no rows to train on": (f"{TRAIN} --ckpt llama", f"{DOLLY} is not here: `hf download"),
    "a data file that is not there": (f"{TRAIN} --ckpt llama --data x.jsonl",
                                      "x.jsonl: no such data file"),
    "no loss": (f"{TRAIN} --cls 0 --mse 0 --rank 0", "one at least is positive"),
    "predictors of another model": (f"{INFER} --ckpt llama --predictors {TOY} --prompt hi "
                                    "--template plain",
                                    "made for another model"),
    "a prompt file in Latin-1": (f"{INFER} --prompt-file latin1.txt", "latin1.txt: not UTF-8 text"),
    "a system text without a place": (f"{INFER} --prompt hi --system be", "no place for a system"),
    "a page that cannot be written": (f"{INFER} --html tiny.gguf/page.html",
                                      "tiny.gguf/page.html: cannot be written"),
    "a device that is not there": ("python saliency.py --device warp",
                                   "device 'warp' is not available here"),
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A folder in which every command of WRONG is wrong."""
    folder = tmp_path_factory.mktemp("wrong")
    llama2(folder / "llama")
    for name in ("half", "pickled"):
        shutil.copytree(folder / "llama", folder / name)
    (folder / "half" / "model-00002-of-00002.safetensors").unlink()
    for file in (folder / "pickled").glob("model*"):
        file.unlink()
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"PK")
    shutil.copy(TOY / "predictors.safetensors", folder / "toy.safetensors")
    (folder / "empty").mkdir()
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    (folder / "latin1.txt").write_bytes("Käse".encode("latin-1"))
    jsonl(folder / "rows.jsonl", [{"instruction": f"question {i}", "response": "b"}
                                  for i in range(20)])
    return folder


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_input_ends_in_one_line(what, wrong, leaves, monkeypatch):
    line, says = WRONG[what]
    monkeypatch.chdir(wrong)
    monkeypatch.setenv("HF_HOME", str(wrong / "hub"))
    assert says in leaves(*line.split()[1:])


def test_places_in_the_hubs_cache_and_under_checkpoints_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = []
    for name in ("models--meta-llama--Small", "datasets--databricks--databricks-dolly-15k"):
        repository = tmp_path / "hub" / name
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0123abcd")
        found.append(repository / "snapshots" / "0123abcd")
        found[-1].mkdir(parents=True)
    (found[0] / "config.json").touch()
    (found[1] / DOLLY).touch()
    assert find("meta-llama/Small") == found[0]
    assert rows_at_hand("meta-llama/Small") == found[1] / DOLLY
    shutil.copytree(TOY, tmp_path / "toy")
    assert find("toy") == TOY and str(find("./toy")) == "toy"
    (tmp_path / "toy").rename("own")
    assert str(find("own")) == "own"
    monkeypatch.setenv("HF_HUB_CACHE", "elsewhere")
    with pytest.raises(FileNotFoundError):
        find("meta-llama/Small")


def test_a_prompt_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffWer?\n".encode())
    assert read_text(tmp_path / "p.txt") == "Wer?\n"
