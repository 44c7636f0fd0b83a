"""Our models inside lm-evaluation-harness: contexts are pruned once, and nothing else changes."""
import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (SCHEDULE, SMOLLM2, frozen_predictors, jsonl, needs, random_rows, real_weights,
                      tiny_model)

from infer import generate
from lab import harness
from lab.quality import Setup
from model import Tokenizer, load
from prune import Schedule, nll, predictor_scorer
from support.files import need
from support.runs import Measured

pytestmark = needs("lm_eval")


class Numbers:
    """A tokenizer of texts like "5 71 8"; `front` stands before every text, but never twice."""
    prefix = 7

    def __init__(self, front):
        self.front = front

    def encode(self, text, bos=True):
        ids = [int(word) for word in text.split()]
        return self.front + ids if bos and ids[:1] != [7] else ids


@pytest.fixture
def make(tmp_path):
    """make(name, front, setup) -> the model of an arm; all keep one file of what was read.

    Without a setup it is the tiny model's, with a tokenizer that puts `front` first.
    """
    def model(name="full", front=(), setup=None):
        tiny = tiny_model()
        setup = setup or Setup(tiny, SCHEDULE, frozen_predictors(), tokenizer=Numbers([*front]))
        return harness.harness_model(setup, name, Measured(tmp_path / "rows", "run"))
    return model


@pytest.fixture
def data(tmp_path):
    """A folder of rows, and of a task that is not lm_eval's: the likelihood of whole texts."""
    rows = {
        "winogrande": [{"sentence": f"Ann asked Bea {i} times as _ was lost.", "option1": "Ann",
                        "option2": "Bea", "answer": "12"[i % 2]} for i in range(5)],
        "boolq": [{"passage": f"The fog hung over {i} boats.", "question": "is there fog",
                   "label": ("false", "true")[i % 2]} for i in range(5)],
        "lambada": [{"text": f"The baker sells {i} loaves of bread"} for i in range(5)]}
    rows["own"] = rows["lambada"]
    for name, lines in rows.items():
        jsonl(tmp_path / f"{name}.jsonl", lines)
    (tmp_path / "own.yaml").write_text("task: own\noutput_type: loglikelihood_rolling\n"
                                       "doc_to_text: ''\ndoc_to_target: '{{text}}'\n")
    return tmp_path


@pytest.fixture
def manager(data):
    """lm_eval's list of some tasks and those under `data`; all of its own take long to read."""
    import lm_eval.tasks
    own = Path(lm_eval.tasks.__file__).parent
    paths = [own / "super_glue", own / "winogrande", own / "lambada", data]
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=paths)


def asked(*args):
    """Requests as lm_eval makes them."""
    return [SimpleNamespace(args=each) for each in args]


# --------------------------------------------------------------------------------------- one model


@pytest.mark.parametrize("name", ["full", "predictor", "random"])
def test_a_context_is_read_once_and_its_continuations_as_if_alone(make, tmp_path, name):
    """And never again, until the file is gone; the order does not matter."""
    rows, file = [example.tokens.tolist() for example in random_rows(3)], tmp_path / "rows"
    pairs = [(None, row[:30], row[30:end]) for row in rows for end in (40, 33)]
    model = make(name)
    found = model._loglikelihood_tokens(pairs)
    assert make(name)._loglikelihood_tokens(pairs) == found
    assert len(file.read_text().splitlines()) == 1 + 3
    file.unlink()
    assert make(name)._loglikelihood_tokens(pairs[2:] + pairs[:2]) == found[2:] + found[:2]
    used = (SCHEDULE, predictor_scorer(model.setup.predictors)) if name == "predictor" else ()
    for (_, context, continuation), (value, _) in zip(pairs, found):
        alone = nll(model.setup.model, torch.tensor([context + continuation]), 30, *used)
        assert name == "random" or value == pytest.approx(-alone.sum().item(), abs=1e-4)


def test_long_contexts_lose_their_first_tokens(make):
    """As many as do not fit: 512 positions, and the last token is not read."""
    model, tokens = make(), [i % 90 for i in range(600)]
    values = model._loglikelihood_tokens([(None, tokens[-n:], [5, 6]) for n in (600, 511, 510)])
    assert values[0] == values[1] != values[2] and len(model.shares) == 2
    with pytest.raises(ValueError, match="a continuation has no tokens"):
        model._loglikelihood_tokens([(None, tokens, [])])


@pytest.mark.parametrize("front", [[], [7]])
@pytest.mark.parametrize("context", ["", " ", "\n\n"])
def test_a_context_without_words_is_the_prefix_token(make, front, context):
    model = make(front=front)
    expected = model._loglikelihood_tokens([(None, [7], [5, 71, 8])])
    assert model.loglikelihood(asked((context, "5 71 8"))) == expected


@pytest.mark.parametrize("name", ["full", "full+h2o"])
def test_what_is_written_is_what_generate_writes(make, name):
    """Up to the first stop text, of which an empty one stops nothing."""
    setup = Setup(load("toy", torch.float32, "cpu"), SCHEDULE, tokenizer=Tokenizer("toy"))
    context, model = "The baker walked past the painted shoes and", make(name, setup=setup)
    ids = torch.tensor([setup.tokenizer.encode(context)])
    text = setup.tokenizer.decode(generate(setup.model, ids, 12, cache=model.arm.cache).tokens)
    stop = text[len(text) // 2:][:3]
    found = model.generate_until(asked(*((context, {"until": until, "max_gen_toks": 12})
                                         for until in ([""], ["nowhere", stop]))))
    assert found == [text, text[:text.index(stop)]]
    with pytest.raises(ValueError, match="draws its texts by chance"):
        model.write(context, {"until": [], "do_sample": True, "temperature": 1.0})


# ------------------------------------------------------------------------------ tasks and results


def test_the_file_of_a_task(tmp_path):
    """And its rows; labels "false" and "true" are numbers."""
    tasks = {"piqa": "piqa", "lambada_openai": "lambada", "longbench_multi_news": "multi_news"}
    for name in (*tasks.values(), "qa", "openai_lambada", "news"):
        jsonl(tmp_path / f"{name}.jsonl", [{"file": name, "label": "true"}])
    for task, name in tasks.items():
        spec, = harness.local_task(task, tmp_path)["task"]
        assert spec["custom_dataset"](version=1)["rows"].to_list() == [{"file": name, "label": 1}]


def test_differences_from_the_full_model_are_paired_by_row():
    """A perplexity is no mean of its rows, and a group has none."""
    results = {}
    for arm, acc in ("full", [1, 1, 0, 0]), ("random", [1, 0, 0, 0]):
        values = {"alias": "a", "sample_len": 4, "acc,none": sum(acc) / 4, "acc_stderr,none": 0.1,
                  "perplexity,none": 20.0, "perplexity_stderr,none": "N/A"}
        rows = [{"filter": "none", "acc": one, "perplexity": -3.0 - one} for one in acc]
        results[arm] = {"results": {"a": values, "group": values}, "samples": {"a": rows}}
    first, *others = harness.table(results, "random", 0.5)
    assert first == {
        "task": "a", "metric": "acc", "scorer": "random", "value": 0.25, "stderr": 0.1, "n": 4,
        "mean_keep": 0.5, "vs_full": -0.25, "vs_full_stderr": pytest.approx(0.25)}
    others += harness.table(results, "full", 1.0)
    assert len(others) == 7 and not any("vs_full" in row for row in others)


# -------------------------------------------------------------------------------------- the command


@pytest.fixture
def command_of(manager, data, monkeypatch):
    """command_of(*words) runs lab.harness with these options and few tasks."""
    def run(*words):
        words = ["lab/harness.py", "--data", data, *words]
        monkeypatch.chdir(data)
        monkeypatch.setattr("sys.argv", [*map(str, words)])
        monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: manager)
        with contextlib.redirect_stdout(sys.stderr):
            harness.main()
    return run


def test_tasks_are_measured_in_several_arms(command_of, capfd):
    command_of("--tasks", "winogrande", "boolq", "lambada_openai", "--limit", 4, "--scorers",
               "full", "predictor", "--num-fewshot", 2, "--json", "--quiet")
    told, text = capfd.readouterr()
    told = json.loads(told)
    assert told["lm_eval"] == "0.4.13" and told["num_fewshot"] == 2 and told["hardware"]
    assert len(told["rows"]) == 2 * (1 + 1 + 2)
    for row in told["rows"]:
        assert row["n"] == 4 and (row["mean_keep"] == 1) == (row["scorer"] == "full")
        assert ("vs_full" in row) == (row["scorer"] != "full" and row["metric"] == "acc")
    assert "predictor, boolq acc: " in text and "contexts are read" not in text


@pytest.mark.parametrize("words, message", [
    (["--tasks", "piqa"], "no rows for piqa, expected a file piqa.jsonl"),
    (["--tasks", "boolq"], "boolq: lm_eval cannot load this task from"),
    (["--tasks", "lambada_openai", "--scorers", "oracle:norm_gx"], "needs to know the right"),
    (["--tasks", "lambada_openai", "--scorers", "full", "best"], "unknown scorer 'best'"),
])
def test_what_cannot_be_measured_is_refused_first(command_of, data, monkeypatch, words, message):
    jsonl(data / "boolq.jsonl", [{"text": "no row of BoolQ"}])
    monkeypatch.setattr(harness, "measure", lambda *_: need(False, "something was measured"))
    with pytest.raises(ValueError, match=message):
        command_of(*words)


def test_the_likelihood_of_a_whole_text_is_refused(command_of):
    with pytest.raises(ValueError, match="there is nothing to prune"):
        command_of("--tasks", "own", "--scorers", "full")


def test_without_lm_eval_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("sys.argv", ["lab/harness.py", "--tasks", "piqa"])
    with pytest.raises(ImportError, match="pip install lm_eval==0.4.13"):
        harness.main()


# --------------------------------------------------------------------- beside lm_eval's own reading


@pytest.mark.real
@real_weights
@needs("transformers")
@needs("accelerate")
def test_all_is_as_lm_eval_s_own_model_says_it(manager, make, data):
    """Likelihoods of pairs, and what is written."""
    from lm_eval.models.huggingface import HFLM
    theirs = HFLM(pretrained=str(SMOLLM2), dtype="float32", device="cpu", batch_size=1)
    ours = make(setup=Setup(load("smollm2", torch.float32, "cpu"), Schedule.scaled(30),
                            tokenizer=Tokenizer("smollm2")))
    requests = asked(("", "The end"))
    for name in ("winogrande", "boolq", "lambada_openai"):
        task = harness.find_tasks(manager, name, data)["tasks"][name]
        task.build_all_requests(limit=3)
        requests += task.instances
    for (value, chosen), (own, own_chosen) in zip(ours.loglikelihood(requests),
                                                  theirs.loglikelihood(requests), strict=True):
        assert value == pytest.approx(own, abs=1e-3) and chosen == own_chosen
    begun = asked(*(("The keeper looked at the sea and", {"until": [stop], "max_gen_toks": 12})
                    for stop in (".", "\n\n")))
    assert ours.generate_until(begun) == theirs.generate_until(begun)
