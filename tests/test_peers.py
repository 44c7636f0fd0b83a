"""lab/peers.py: the same bytes, the same unpruned model, and where an answer stands."""
import contextlib
import json
import sys
from dataclasses import replace
from importlib import metadata

import pytest
import torch

from conftest import SCHEDULE, TOY, command, needs
from lab import peers, quality
from lab.peers import WHOLE, Peers, check_same, compression_ratio, mean_count
from lab.tasks import Answer, Item
from model import Tokenizer
from prune import Schedule, extend, kv_bytes, prefill
from support.data import encode_row
from support.options import add_pruning_arguments, command_parser
from support.saved import load_pruning

ROWS = [json.loads(line) for line in (TOY / "train.jsonl").read_text().splitlines()[-3:]]


@pytest.fixture(scope="module")
def toy():
    """The toy's Setup, and Items of its rows."""
    parser = command_parser("")
    add_pruning_arguments(parser)
    args = parser.parse_args(["--predictors", "checkpoints/toy", "--device", "cpu"])
    model, schedule, predictors, _ = load_pruning(args)
    tokenizer = Tokenizer("toy")
    items = [quality.as_item(encode_row(tokenizer, row)) for row in ROWS]
    return quality.Setup(model, schedule, predictors), items


class Cut:
    """A press as kvpress has them, without it: of every cache the first and the last tokens stay.

    What StreamingLLM keeps, and as many as compression_ratio says.
    """

    def __init__(self, compression_ratio):
        self.share = 1 - compression_ratio

    @contextlib.contextmanager
    def __call__(self, model):
        hooks = [layer.self_attn.register_forward_hook(self.hook, with_kwargs=True)
                 for layer in model.model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def hook(self, module, args, kwargs, output):
        held = kwargs["past_key_values"].layers[module.layer_idx]
        n = held.keys.shape[2]
        index = survivors(n, int(n * self.share))
        held.keys, held.values = held.keys[:, :, index], held.values[:, :, index]


def survivors(n, k):
    """4 first and k - 4 last of n."""
    return [*range(4), *range(n - k + 4, n)]


def cut_by_hand(model, item, k):
    """The log-likelihood of an answer in our own decoder, on caches of the same survivors."""
    prompt, answer = torch.tensor([item.prompt]), item.answers[0]
    N, n = len(item.prompt), len(answer.tokens)
    first, caches, _ = prefill(model, prompt, room=n)
    index = survivors(N, k)
    for cache in caches:
        for held in (cache.k, cache.v):
            held[:, :, :k] = held[:, :, index]
        cache.pos[:, :k] = cache.pos[:, index]
        cache.n = k
    ids = torch.tensor([answer.tokens])
    logits = torch.cat((first[:, None], extend(model, ids[:, :-1], N, caches)), 1)[0]
    return logits.log_softmax(-1).gather(1, ids.T).sum().item()


# --------------------------------------------------------------------------------- without kvpress


@pytest.mark.parametrize("schedule, blocks", [(Schedule(), 32), (SCHEDULE, 6),
                                              (Schedule.scaled(30), 30), (Schedule(stages=0), 4)])
def test_a_press_keeps_as_much_as_the_schedule(schedule, blocks):
    for n in [5, 65, 97, 128, 371, 1000, 2047]:
        k, total = mean_count(schedule, n, blocks), sum(schedule.counts(n, blocks))
        compressed = compression_ratio(k, n)
        assert 0 <= compressed < 1
        assert max(1, int(n * (1 - compressed))) == k       # kvpress' own rule
        assert abs(blocks * k - total) <= blocks / 2


@pytest.mark.parametrize("version, fault", [
    ("5.2.0", "import of kvpress halted"),
    ("5.3.0", "it does not work with transformers 5.3.0"),
    ("6.0.dev1", "it does not work with transformers 6.0.dev1"),
])
def test_the_command_says_what_it_needs(leaves, monkeypatch, version, fault):
    monkeypatch.setitem(sys.modules, "kvpress", None)       # as if it were not there
    monkeypatch.setattr(metadata, "version", lambda name: version)
    monkeypatch.setattr(peers, "load_pruning", None)        # no weights are read
    ended = leaves("lab/peers.py", "--limit", 1, "--presses", "Knorm")
    assert len(ended.splitlines()) == 1
    assert "pip install kvpress 'transformers<5.3', in an environment of its own" in ended
    assert f"kvpress ({fault}" in ended


@pytest.mark.parametrize("words, message", [
    (("--dtype", "bfloat16"), "compared in float32"),
    (("--scorers", "full+h2o"), "leave out +h2o and +local"),
    (("--scorers", "nonsense"), "unknown scorer"),
    (("--max-prompt", 64, "--data", "short.jsonl"), "row 1: SnapKV needs prompts of more than 64"),
])
def test_bad_input_ends_in_one_line(leaves, tmp_path, monkeypatch, words, message):
    row = {"instruction": "What does Clara sell?", "response": "Cups."}
    (tmp_path / "short.jsonl").write_text((json.dumps(row) + "\n") * 40)
    monkeypatch.chdir(tmp_path)
    ended = leaves("lab/peers.py", *words)
    assert message in ended and len(ended.splitlines()) == 1


def test_a_sliding_window_has_to_hold_everything(tiny):
    item = Item(list(range(70)), [Answer([1, 2, 3], 0)])
    config = tiny.config
    peers.check_items([item], ["SnapKV"], config)
    peers.check_items([item], ["SnapKV"], replace(config, window=72))
    with pytest.raises(ValueError, match="sliding window of 71 tokens"):
        peers.check_items([item], ["SnapKV"], replace(config, window=71))


def test_our_arms():
    args = peers.options().parse_args([])
    assert peers.chosen_arms(args, trained=True) == ["full", "predictor", "random"]
    assert peers.chosen_arms(args, trained=False) == ["full", "random"]
    args = peers.options().parse_args(["--scorers", "random", "recent@3", "full"])
    assert peers.chosen_arms(args, trained=True) == ["full", "random", "recent@3"]


def test_another_unpruned_model_is_refused():
    found = {"full": {"answers": [[-10.0, 8, True]]}, WHOLE: {"answers": [[-10.0007, 8, True]]}}
    check_same(found, 0)
    found[WHOLE]["answers"][0][0] = -10.001
    with pytest.raises(ValueError, match=r"row 3: .* is 1\.25000 per token here and 1\.2501\d in"):
        check_same(found, 2)
    found[WHOLE]["answers"][0][0] = float("nan")
    with pytest.raises(ValueError):
        check_same(found, 0)


def test_the_second_table(tiny, capsys):
    items = [Item([0] * n, [Answer([1], 0)]) for n in (10, 30)]
    rows = [{"full": {"keep": 1.0, "prefill_s": 2.0}, "Knorm": {"keep": 0.5, "prefill_s": 4.0}}] * 2
    full, knorm = peers.costs(rows, ["full", "Knorm"], items, tiny.config)
    assert full["kv_bytes"] == 2 * knorm["kv_bytes"] == kv_bytes(tiny.config, [20] * 6, 4)
    assert full["prefill_speedup"] == 1.0 and knorm["prefill_speedup"] == 0.5
    assert knorm["prefill_speedup_stderr"] == 0.0
    peers.show_costs([full, knorm])
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        "Knorm", "0.012", "4.000", "0.50", "+-", "0.00"]


# -------------------------------------------------------------------------------- with transformers


@needs("transformers")
def test_an_answer_goes_on_where_the_prompt_ended(toy):
    """On a compressed cache it is as likely as in our decoder, to which positions are known."""
    setup, items = toy
    theirs = peers.load_peers("toy", "cpu", {"StreamingLLM": Cut})
    lost = []
    for item in items:
        N = len(item.prompt)
        k = mean_count(setup.schedule, N, 12)
        press = Cut(compression_ratio(k, N))
        (value, count, _), held, seconds = peers.read_peer(theirs, item, press)
        assert value == pytest.approx(cut_by_hand(setup.model, item, k), abs=1e-3)
        assert held == kv_bytes(setup.model.config, [k] * 12, 4)
        assert count == len(item.answers[0].tokens) and seconds > 0
        lost.append(peers.read_peer(theirs, item)[0][0] - value)
    assert max(lost) > 1            # nats: the cut was felt


@needs("transformers")
def test_an_answer_of_one_token(toy):
    setup, items = toy
    theirs = peers.load_peers("toy", "cpu", {})
    item = items[0]._replace(answers=[Answer(items[0].answers[0].tokens[:1], 0)])
    (value, count, chosen), _, _ = peers.read_peer(theirs, item)
    ours = quality.measure(setup, item, ["full"], 0)["full"]["answers"][0]
    assert value == pytest.approx(ours[0], abs=1e-4) and [count, chosen] == ours[1:]


@needs("transformers")
def test_rows_go_on_where_they_stopped(toy, tmp_path):
    setup, items = toy
    theirs = peers.load_peers("toy", "cpu", {"StreamingLLM": Cut})
    log, arms = tmp_path / "rows.jsonl", ["full", "predictor", "random"]
    first = peers.measure_rows(setup, theirs, items[:1], arms, log, "run", quiet=True)
    done = peers.measure_rows(setup, theirs, items, arms, log, "run", quiet=True)
    assert done[0] == first[0] and len(done) == 3
    assert set(done[1]) == {*arms, WHOLE, "StreamingLLM"}
    rows = quality.table(done, [*arms, *theirs.names], "nll", items)
    table = {row["scorer"]: row for row in rows}
    assert table[WHOLE]["share_of_gap"] == pytest.approx(1, abs=1e-4)
    kept = table["StreamingLLM"]["mean_keep"]
    assert kept == pytest.approx(table["random"]["mean_keep"], abs=0.5 / len(items[0].prompt))


@needs("transformers")
def test_other_bytes_are_refused(toy):
    setup, items = toy
    theirs = Peers(*peers.load_peers("toy", "cpu", {})[:2],
                   {"Knorm": lambda compression_ratio: Cut(compression_ratio - 0.1)})
    with pytest.raises(ValueError, match=r"row 5: Knorm holds .* bytes after the prompt, our"):
        peers.measure_peers(setup, theirs, items[0], 4)


# ------------------------------------------------------------------------------------- with kvpress


@needs("kvpress")
def test_the_command(tmp_path):
    log = tmp_path / "rows.jsonl"
    code, out, err = command("-m", "lab.peers", "--limit", 2, "--rows-file", log, "--json")
    assert code == 0, err
    found = json.loads(out)
    scorers = ["full", "predictor", "random", WHOLE, *peers.PRESSES]
    assert [row["scorer"] for row in found["rows"]] == scorers
    assert [row["scorer"] for row in found["costs"]] == scorers
    rows = {row["scorer"]: row for row in found["rows"]}
    assert rows[WHOLE]["vs_full"] == pytest.approx(0, abs=1e-4)
    for name in peers.PRESSES:
        assert rows[name]["mean_keep"] == pytest.approx(rows["random"]["mean_keep"], abs=2e-3)
    assert len(log.read_text().splitlines()) == 3


@needs("kvpress")
def test_streaming_llm_is_what_we_think_it_is(toy):
    setup, items = toy
    presses = peers.find_presses(["StreamingLLM"])
    theirs = peers.load_peers("toy", "cpu", presses)
    N = len(items[0].prompt)
    k = mean_count(setup.schedule, N, 12)
    press = presses["StreamingLLM"](compression_ratio=compression_ratio(k, N))
    (value, _, _), _, _ = peers.read_peer(theirs, items[0], press)
    assert value == pytest.approx(cut_by_hand(setup.model, items[0], k), abs=1e-3)
