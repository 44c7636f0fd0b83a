"""Our models inside lm-evaluation-harness: contexts are pruned once, and nothing else changes."""
import importlib.util
import json
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import (SCHEDULE, SMOLLM2, command, needs, predictors_for, random_rows,
                      real_weights)

from infer import generate
from lab import harness, quality
from lab.harness import Kept, Reader, before, data_file, harness_model
from lab.quality import Setup
from lab.tasks import Answer, Item
from model import Tokenizer, load
from prune import UNPRUNED, Schedule, nll, predictor_scorer
from support.files import need

LM_EVAL = bool(importlib.util.find_spec("lm_eval"))


@pytest.fixture
def lm_eval():
    """The package; tests that need it are skipped where it is not."""
    pytest.importorskip("lm_eval", reason=harness.WANTED)
    return harness.lm_eval_parts()


@pytest.fixture(scope="module")
def manager():
    """lm_eval's list of its tasks, which takes seconds to read."""
    pytest.importorskip("lm_eval", reason=harness.WANTED)
    return harness.lm_eval_parts().tasks.TaskManager()


@pytest.fixture(scope="module")
def toy():
    return Setup(load("toy", torch.float32, "cpu"), Schedule.scaled(12), tokenizer=Tokenizer("toy"))


@pytest.fixture
def setup(tiny):
    return Setup(tiny, SCHEDULE, predictors_for(tiny))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs_of(rows):
    """(context, continuation) of Examples, and each context once more with a shorter one."""
    tokens = [(e.tokens[:e.prompt_len].tolist(), e.tokens[e.prompt_len:].tolist()) for e in rows]
    return [*tokens, *((context, continuation[:3]) for context, continuation in tokens)]


# ---------------------------------------------------------------------------- what needs no lm_eval


@pytest.mark.parametrize("name", ["full", "predictor", "predictor@2", "random"])
def test_a_context_is_read_once_and_its_continuations_as_if_alone(setup, monkeypatch, name):
    calls, real = [], quality.prefill

    def counting(model, tokens, *rest):
        calls.append(tokens.shape[1])
        return real(model, tokens, *rest)

    monkeypatch.setattr(quality, "prefill", counting)
    pairs = pairs_of(random_rows(3))
    reader = Reader(setup, name)
    found = reader.read(pairs)
    assert len(calls) == 3 and len(reader.shares) == 3
    assert found[5:] + found[:5] == Reader(setup, name).read(pairs[5:] + pairs[:5])
    if name in ("full", "predictor"):
        used = (None, None) if name == "full" else (SCHEDULE, predictor_scorer(setup.predictors))
        for (context, continuation), (value, _) in zip(pairs, found, strict=True):
            tokens = torch.tensor([context + continuation])
            alone = -nll(setup.model, tokens, len(context), *used).sum().item()
            assert value == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("name", ["full", "predictor@3", "earliest+h2o", "compress"])
def test_an_arm_reads_as_in_lab_quality(setup, name):
    context, continuation = pairs_of(random_rows(1))[0]
    item = Item(context, [Answer(continuation, 0), Answer(continuation[:2], 0)])
    expected = quality.measure_arm(setup, item, setup.arm(name), 0, {})
    reader = Reader(setup, name)
    found = reader.read([(context, answer.tokens) for answer in item.answers])
    assert found == [(value, chosen) for value, _, chosen in expected["answers"]]
    assert reader.shares == [expected["keep"]]


def test_what_was_read_is_not_read_again(setup, tmp_path, monkeypatch, capsys):
    """Stopped after two contexts, in the middle of a third line; and of another model."""
    log, pairs = tmp_path / "some" / "rows", pairs_of(random_rows(3))
    expected = Reader(setup, "random").read(pairs)
    reader = Reader(setup, "random", kept=Kept(log, "run"))
    assert reader.read(pairs[:2]) == expected[:2]
    with log.open("a") as f:
        f.write('{"row": 2, "key"')
    calls, real = [], quality.prefill
    monkeypatch.setattr(quality, "prefill", lambda *words: calls.append(1) or real(*words))
    again = Reader(setup, "random", kept=Kept(log, "run"))
    assert again.read(pairs[:2]) == expected[:2] and not calls
    assert again.shares == reader.shares
    assert again.read(pairs) == expected
    assert len(calls) == 3, "with a second continuation a context is another question"
    assert f"2 rows are in {log} already" in capsys.readouterr().out
    assert len(log.read_text().splitlines()) == 1 + 5
    Reader(setup, "full", kept=Kept(log, "run")).read(pairs[:1])
    assert len(calls) == 4, "an arm has its own"
    with pytest.raises(ValueError, match="these rows belong to another command"):
        Kept(log, "another model")


def test_a_text_is_not_written_again(toy, monkeypatch, tmp_path):
    context = toy.tokenizer.encode("Anna sells old maps. Question: what does Anna sell? Answer:")
    said = Reader(toy, "full", kept=Kept(tmp_path / "rows", "")).write(context, 6, ["."])
    monkeypatch.setattr(harness, "prefill", None)
    again = Reader(toy, "full", kept=Kept(tmp_path / "rows", ""))
    assert again.write(context, 6, ["."]) == said and again.shares == [1.0]


def test_the_mean_share_that_is_kept(setup):
    full, pruned = Reader(setup, "full"), Reader(setup, "predictor")
    for reader in (full, pruned):
        reader.read(pairs_of(random_rows(1)))
    assert full.shares == [1.0]
    assert pruned.shares == [sum(SCHEDULE.counts(30, 6)) / 6 / 30]


def test_a_continuation_says_whether_it_is_the_model_s_own(setup):
    context = random_rows(1)[0].tokens[:30].tolist()
    own = generate(setup.model, torch.tensor([context]), 4, eos=()).tokens
    other = own[:3] + [(own[3] + 1) % 90]
    found = Reader(setup, "full").read([(context, own), (context, other)])
    assert [chosen for _, chosen in found] == [True, False]


def test_long_contexts_lose_their_first_tokens(setup):
    tokens = [i % 90 for i in range(600)]
    reader = Reader(setup, "full")
    long, short = reader.read([(tokens, [5, 6]), (tokens[-511:], [5, 6])])
    assert long == short and reader.cut == 1 and len(reader.shares) == 1
    with pytest.raises(ValueError, match="a continuation of 513 tokens: expected 1 to 512"):
        reader.read([([1], tokens[:513])])
    with pytest.raises(ValueError, match="a continuation of 0 tokens"):
        reader.read([([1], [])])


@pytest.mark.parametrize("name", ["full", "earliest", "full+h2o"])
def test_what_is_written_is_what_generate_writes(toy, name):
    ids = toy.tokenizer.encode("The baker walked past the painted shoes and")
    arm = toy.arm(name)
    used = (UNPRUNED, None) if arm.scorer == "full" else (
        toy.schedule, quality.make_scorer(name, toy.model, toy.schedule))
    expected = generate(toy.model, torch.tensor([ids]), 12, *used, cache=arm.cache)
    said = [token for token in expected.tokens if token not in toy.model.config.eos]
    text = toy.tokenizer.decode(said)
    reader = Reader(toy, name)
    assert reader.write(ids, 12, []) == text
    stop = text[len(text) // 2:][:3]
    assert reader.write(ids, 12, ["nowhere", stop]) == text[:text.index(stop)]


def test_a_text_ends_before_the_first_stop_string():
    assert before("a\n\nQ: b", ["Q:", "\n\n"]) == "a"


@pytest.mark.parametrize("files, task, name", [
    (["piqa", "qa"], "piqa", "piqa"),
    (["lambada", "boolq"], "lambada_openai", "lambada"),
    (["news", "multi_news"], "longbench_multi_news", "multi_news"),
    (["boolq", "bool"], "piqa", None),
    (["iqa", "piq"], "piqa", None),
])
def test_the_file_of_a_task(tmp_path, files, task, name):
    for file in files:
        jsonl(tmp_path / f"{file}.jsonl", [])
    if name:
        assert data_file(tmp_path, task) == tmp_path / f"{name}.jsonl"
    else:
        with pytest.raises(ValueError, match=f"no rows for {task}, expected a file {task}.jsonl"):
            data_file(tmp_path, task)


@pytest.mark.skipif(LM_EVAL, reason="lm_eval is installed")
def test_without_lm_eval_one_line_says_how_to_get_it():
    code, out, err = command("-m", "lab.harness", "--tasks", "piqa")
    assert code == 1 and not out and err.count("\n") == 1
    assert "pip install lm_eval==0.4.13" in err


# ----------------------------------------------------------------------------------- inside lm_eval


def request(*args):
    return SimpleNamespace(args=args)


@pytest.mark.parametrize("context, continuation", [
    ("The baker sells", " bread"), ("The baker sells  ", "bread"), ("The baker", "s"), ("A", "")])
def test_a_pair_is_cut_as_lm_eval_cuts_it(lm_eval, toy, context, continuation):
    """The continuation is what the whole has after as many tokens as the bare context has."""
    model, encode = harness_model(Reader(toy, "full")), toy.tokenizer.encode
    left, right = model._encode_pair(context, continuation)
    assert left == encode(context.rstrip())
    assert left + right == encode(context.rstrip()) + encode(context + continuation)[len(left):]


def test_an_empty_context_is_the_prefix_token(lm_eval, toy):
    model, encode = harness_model(Reader(toy, "full")), toy.tokenizer.encode
    text = "The baker"
    found = model.loglikelihood([request("", text)])
    expected = Reader(toy, "full").read([([toy.tokenizer.prefix], encode(text, bos=False))])
    assert found == expected and model.loglikelihood_rolling([request(text)]) != expected


def test_a_whole_text_is_read_in_windows_and_never_pruned(lm_eval, tiny):
    class Numbers:
        prefix = 7

        def encode(self, text, bos=True):
            return [int(word) for word in text.split()]

    setup = Setup(tiny, SCHEDULE, predictors_for(tiny), tokenizer=Numbers())
    ids = [i * 7 % 90 for i in range(700)]
    asked = [request(" ".join(map(str, ids[:n]))) for n in (200, 700)]
    short, long = harness_model(Reader(setup, "full")).loglikelihood_rolling(asked)
    window = nll(tiny, torch.tensor([[7, *ids[:200]]]), 1).sum().item()
    assert short == pytest.approx(-window, abs=1e-3)
    first = nll(tiny, torch.tensor([[7, *ids[:511]]]), 1).sum().item()
    second = nll(tiny, torch.tensor([ids[187:700]]), 325)       # the last 188 are new
    assert long < -first - second[0, :10].sum().item()
    with pytest.raises(ValueError, match="no prompt to prune, so it takes --scorers full"):
        harness_model(Reader(setup, "predictor")).loglikelihood_rolling(asked)


def test_generate_until_stops_and_refuses_chance(lm_eval, toy):
    model, reader = harness_model(Reader(toy, "earliest")), Reader(toy, "earliest")
    text = "The baker walked past the painted shoes and"
    whole = reader.write(toy.tokenizer.encode(text), 10, [])
    stop = whole[len(whole) // 2:][:2]
    asked = [request(text, {"until": [""], "max_gen_toks": 10, "do_sample": False}),
             request(text, {"until": stop, "max_gen_toks": 10})]
    assert model.generate_until(asked) == [whole, whole[:whole.index(stop)]]
    with pytest.raises(ValueError, match="draws its texts by chance"):
        model.generate_until([request(text, {"until": [], "do_sample": True, "temperature": 1.0})])


# -------------------------------------------------------------------------------------- the command


ROWS = {
    "copa": [{"premise": f"The baker met {i} men.", "choice1": "He was late.", "label": i % 2,
              "choice2": "It rained.", "question": ("cause", "effect")[i % 2]} for i in range(8)],
    "winogrande": [{"sentence": f"Ann asked Bea {i} times as _ was lost.", "option1": "Ann",
                    "option2": "Bea", "answer": "12"[i % 2]} for i in range(8)],
    "boolq": [{"passage": f"The fog hung over {i} boats.", "question": "is there fog",
               "label": ("false", "true")[i % 2]} for i in range(8)],
    "lambada": [{"text": f"The baker sells {i} loaves of bread"} for i in range(8)],
}
OFFLINE = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def data(tmp_path):
    for name, rows in ROWS.items():
        jsonl(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


@pytest.mark.skipif(not LM_EVAL, reason=harness.WANTED)
def test_tasks_are_measured_in_several_arms(data):
    tasks = ["copa", "winogrande", "boolq", "lambada_openai"]
    words = ["--data", data, "--tasks", *tasks, "--scorers", "full", "random", "predictor",
             "--limit", 6, "--num-fewshot", 2, "--rows-file", data / "rows", "--json", "--quiet"]
    code, out, err = command("-m", "lab.harness", *words, env=OFFLINE)
    assert code == 0, err
    told = json.loads(out)
    assert told["lm_eval"] == "0.4.13" and told["num_fewshot"] == 2 and told["hardware"]
    kinds = {(row["task"], row["metric"]) for row in told["rows"]}
    assert kinds == {*((task, "acc") for task in tasks), ("lambada_openai", "perplexity")}
    for row in told["rows"]:
        assert row["n"] == 6 and (row["mean_keep"] == 1) == (row["scorer"] == "full")
        paired = row["metric"] == "acc" and row["scorer"] != "full"
        assert ("vs_full" in row) == paired     # a perplexity is no mean of its rows
        if paired:
            full, = [other["value"] for other in told["rows"] if other["scorer"] == "full"
                     and (other["task"], other["metric"]) == (row["task"], "acc")]
            assert row["vs_full"] == pytest.approx(row["value"] - full)
    assert "copa, 6 rows" in err and "against full" in err


@pytest.mark.parametrize("words, message", [
    (["--tasks", "no_such_task"], "lm_eval knows no task 'no_such_task'"),
    (["--tasks", "piqa", "--data", "."], "no rows for piqa, expected a file piqa.jsonl"),
    (["--tasks", "piqa", "--data", "nowhere"], "nowhere: no such folder"),
    (["--tasks", "copa", "--scorers", "oracle:norm_gx"], "needs to know the right answer"),
    (["--tasks", "copa", "--scorers", "best"], "unknown scorer 'best'"),
    (["--tasks", "boolq"], "boolq.jsonl (UndefinedError: 'passage' is undefined)"),
    (["--tasks", "super-glue-lm-eval-v1"], "stands for several tasks: with --data, name each"),
])
def test_what_cannot_be_measured_is_refused_in_one_line(lm_eval, manager, leaves, data, monkeypatch,
                                                        words, message):
    jsonl(data / "boolq.jsonl", [{"text": "no row of BoolQ"}])
    if "--data" not in words:
        words = [*words, "--data", data]
    elif words[-1] == ".":
        monkeypatch.chdir(data)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path: manager)
    monkeypatch.setattr(harness, "load_pruning", lambda *_: need(False, "weights were read"))
    told = leaves("lab.harness", *words)
    assert message in told and "\n" not in told


def test_the_parts_of_the_command_serve_from_python(lm_eval, manager, toy, data):
    found = harness.find_tasks(manager, "winogrande", data)
    harness.set_shots(found["tasks"], None)
    rows, cut = harness.measure(toy, ["full", "earliest"], found, 4, quiet=True)
    assert [row["scorer"] for row in rows] == ["full", "earliest"] and cut == 0
    assert all(0 <= row["value"] <= 1 and row["stderr"] is not None for row in rows)


@pytest.mark.parametrize("labels", [["true", "false"], [True, False], [1, 0]])
def test_a_label_is_the_number_of_a_choice(lm_eval, manager, tmp_path, labels):
    rows = [{"passage": "p", "question": "q", "label": label} for label in labels]
    jsonl(tmp_path / "boolq.jsonl", rows)
    task, = harness.find_tasks(manager, "boolq", tmp_path)["tasks"].values()
    assert [task.doc_to_target(row) for row in task.eval_docs] == [1, 0]
    right, wrong = (-1.0, False), (-2.0, False)
    first = task.eval_docs[0]
    assert task.process_results(first, [wrong, right])["acc"] == 1
    assert task.process_results(first, [right, wrong])["acc"] == 0


@pytest.mark.parametrize("label", ["maybe", 2, -1])
def test_an_answer_that_is_no_choice_names_its_row(lm_eval, manager, tmp_path, label):
    """lm_eval itself would count the row as wrong, whatever the model says."""
    other = "no" if label == "maybe" else 1         # the choice itself is right too
    rows = [{"passage": "p", "question": "q", "label": label} for label in (other, label)]
    jsonl(tmp_path / "boolq.jsonl", rows)
    with pytest.raises(ValueError, match="boolq.jsonl, row 2: its right answer, .* is no choice"):
        harness.find_tasks(manager, "boolq", tmp_path)


YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    rows: {file}
test_split: rows
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{{{{text}}}}"
"""


def test_tasks_of_one_s_own_and_whole_texts(lm_eval, leaves, toy, data, monkeypatch, capsys):
    """A folder of yaml files: a group has the mean of its tasks, whole texts are not pruned."""
    file, only_these = data / "lambada.jsonl", lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager",
                        lambda include_path: only_these(None, include_path, False))
    for name in "abc":
        kind, text = "loglikelihood", "The baker"
        if name == "c":
            kind, text = "loglikelihood_rolling", ""
        (data / f"{name}.yaml").write_text(YAML.format(name=name, file=file, kind=kind, text=text))
    (data / "group.yaml").write_text("group: both\ntask: [a, b]\naggregate_metric_list:\n"
                                     "  - metric: acc\n")
    words = ["--tasks-dir", data, "--limit", 3, "--quiet", "--scorers", "full"]
    monkeypatch.setattr("sys.argv", ["lab/harness.py", *map(str, words), "--tasks", "both", "c"])
    harness.main()
    told = capsys.readouterr().out
    assert "both, 6 rows" in told and "c, 3 rows" in told and "word_perplexity" in told
    told = leaves("lab.harness", *words, "random", "--tasks", "c")
    assert "there is no prompt to prune" in told


# --------------------------------------------------------------------- beside lm_eval's own reading


@pytest.fixture(scope="module")
def both(manager):
    """SmolLM2 as our model of lm_eval, and as its own."""
    from lm_eval.models.huggingface import HFLM
    model = load("smollm2", torch.float32, "cpu")
    setup = Setup(model, Schedule.scaled(30), tokenizer=Tokenizer("smollm2"))
    theirs = HFLM(pretrained=str(SMOLLM2), dtype="float32", device="cpu", batch_size=1)
    return harness_model(Reader(setup, "full")), theirs


@pytest.mark.real
@real_weights
@needs("transformers")
@needs("accelerate")
@pytest.mark.parametrize("task", ROWS)
def test_every_likelihood_is_that_of_lm_eval_s_own_model(manager, both, data, task):
    ours, theirs = both
    name = "lambada_openai" if task == "lambada" else task
    task, = harness.find_tasks(manager, name, data)["tasks"].values()
    task.build_all_requests(limit=3)
    asked = [instance.args for instance in task.instances]
    for pair in asked:
        assert ours._encode_pair(*pair) == theirs._encode_pair(*pair)
    assert ours.prefix_token_id == theirs.prefix_token_id
    requests = [request(*args) for args in [*asked, ("", "The end")]]
    for (value, chosen), (own, own_chosen) in zip(ours.loglikelihood(requests),
                                                  theirs.loglikelihood(requests), strict=True):
        assert value == pytest.approx(own, abs=1e-3) and chosen == own_chosen
    whole = [request("The keeper looked at the sea, which was rising.")]
    expected = theirs.loglikelihood_rolling(whole)
    assert ours.loglikelihood_rolling(whole) == pytest.approx(expected, abs=1e-3)


@pytest.mark.real
@real_weights
@needs("transformers")
@needs("accelerate")
def test_what_it_writes_is_what_lm_eval_s_own_model_writes(both):
    ours, theirs = both
    options = [{"until": ["."], "max_gen_toks": 12}, {"until": ["\n\n"], "max_gen_toks": 12}]
    asked = [request("The keeper looked at the sea and", one) for one in options]
    assert ours.generate_until(asked) == theirs.generate_until(asked)
