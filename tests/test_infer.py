"""infer.py: generation, the times of both arms, the command lines, the committed toy's answers.

Pruned generation against a full recompute: tests/test_independent.py.
"""
import json
import math
import sys
from dataclasses import asdict
from itertools import islice

import pytest
import torch

import infer
from conftest import SCHEDULE, TOY, command, tiny_model
from infer import ask, bench, compare, decode, generate, greedy, sampler
from lab.scorers import norm, random_scorer
from model import Tokenizer
from prune import UNPRUNED, extend, prefill
from support.config import SHAPES
from support.options import infer_options, read_prompt
from support.runs import Progress
from support.weights import compile_blocks

# whatever was trained in this clone
COMMITTED = "--predictors", str(TOY)
SHORT = *COMMITTED, "--prompt", "The fog moved. " * 40
QUIET = Progress(quiet=True)

# -------------------------------------------------------------------------------------- generation


@pytest.fixture
def said(tiny, tokens):
    """Eight tokens, each the likeliest after a pass over all that stands before it."""
    for _ in range(8):
        tokens = torch.cat((tokens, tiny(tokens)[:, -1:].argmax(-1)), 1)
    return tokens[0, -8:].tolist()


def test_questions_are_answered_on_caches_as_if_each_were_the_only_one(tokens):
    """Pruned or not; against a prefill of its own and a decode that sets nothing back."""
    model, questions = tiny_model(window=23), [tokens[:, a:a + 5] for a in (50, 3, 17)]
    for arm in ((), (SCHEDULE, norm)):
        def fresh():
            return prefill(model, tokens[:, :48], *arm, room=12)[1]

        caches, wanted = fresh(), []
        held = [cache.n for cache in caches]
        for question in questions:
            own = fresh()
            logits = extend(model, question, 48, own)[:, -1]
            wanted.append(list(islice(decode(model, logits, own, 53), 8)))
        for _ in range(2):
            found = [ask(model, question, 48, caches, 8, eos=()) for question in questions]
            assert [each.tokens for each in found] == wanted
            assert [cache.n for cache in caches] == held
    assert len(set(map(tuple, wanted))) == 3 and found[0].prefill_s > 0 < found[0].decode_s


def test_generation_stops_at_an_end_or_where_it_is_told(tiny, tokens, said):
    end = said[2]
    until = said[:said.index(end) + 1]
    for given in ({"eos": (end,)}, {"eos": (89, end)}, {"stop": lambda new: new[-1] == end}):
        run = generate(tiny, tokens, 8, **given)
        assert run.tokens == until and run.ended == ("eos" in given)
    own = tiny_model(eos=(end,))                    # the model's own is the default
    assert generate(own, tokens, 8).tokens == until
    assert generate(own, tokens, 8, eos=()).tokens == said


def test_how_a_token_is_chosen(tiny, tokens, said):
    def drawn(temperature):
        torch.manual_seed(1)
        return generate(tiny, tokens, 8, pick=sampler(temperature)).tokens

    assert sampler(0) is greedy
    assert drawn(1e-4) == said
    assert drawn(2.0) == drawn(2.0) != said
    for temperature in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="expected 0 or more"):
            sampler(temperature)


@pytest.mark.parametrize("damage", [math.nan, math.inf])
@pytest.mark.parametrize("pick", [greedy, sampler(2.0)], ids=["greedy", "drawn"])
def test_logits_that_are_not_finite_are_said_and_not_sampled(tiny, tokens, damage, pick):
    """Also where only decode meets the damage: a row of the embedding for the first new token."""
    def made(new):
        torch.manual_seed(1)
        return generate(tiny, tokens[:, :8], new, pick=pick, eos=()).tokens

    first = made(1)
    assert first[0] not in tokens[0, :8]
    tiny.embed.weight.data[first] = damage
    assert made(1) == first
    for new, tensor in ((4, tiny.embed), (1, tiny.head)):
        tensor.weight.data[first] = damage
        with pytest.raises(ValueError, match="not finite in torch.float32: the weights are dam"):
            made(new)


def test_too_many_new_tokens_are_refused_before_the_prompt_is_read(tokens, monkeypatch):
    """A prompt of 60 and 5 new tokens read positions up to 63: the last token is never read."""
    model = tiny_model(max_positions=64)
    assert len(generate(model, tokens, 5, eos=()).tokens) == 5
    monkeypatch.setattr(infer, "prefill", pytest.fail)
    with pytest.raises(ValueError, match="position 64 is past this model's 64 positions"):
        generate(model, tokens, 6)
    with pytest.raises(ValueError, match="max_new_tokens is 0, expected at least 1"):
        generate(model, tokens, 0)


# ------------------------------------------------------------------------------------------- times


def test_arms_are_compared_over_as_many_tokens(tokens):
    """Whatever they say, an end of the text too; caches are counted after the prompt."""
    model = tiny_model(eos=tuple(range(90)))
    arms = {"full": (UNPRUNED, None), "sdtp": (SCHEDULE, random_scorer(1))}
    row = compare(model, tokens, arms, 6, 2, QUIET)
    assert (row["n"], row["repeats"]) == (60, 2)
    for name, (schedule, _) in arms.items():
        arm = row[name]
        assert arm["prefill_s"] > 0 and arm["decode_s"] > 0, "more than one token"
        assert arm["e2e_s"] == arm["prefill_s"] + 5 * arm["decode_s"]
        assert arm["kv_bytes"] == sum(schedule.counts(60, 6)) * 2 * 24 * 4
    assert row["speedup"]["prefill"] == row["full"]["prefill_s"] / row["sdtp"]["prefill_s"]
    assert 1 < row["ideal"] < 3
    assert row["share_of_ideal"] == row["speedup"]["prefill"] / row["ideal"]


def test_bench_looks_at_all_lengths_first():
    with pytest.raises(ValueError, match="position 64 is past this model's 64 positions"):
        next(bench(tiny_model(max_positions=64), {}, [20, 62, 30], 4, 1, QUIET))


def test_compiled_blocks_say_the_same(tiny, tokens, said, monkeypatch):
    parts = []
    monkeypatch.setattr(torch, "compile", lambda part, dynamic: parts.append(part) or part)
    compile_blocks(tiny.blocks)
    assert len(parts) == 2 * 6
    assert generate(tiny, tokens, 8).tokens == said


# ------------------------------------------------------------------------------------ command lines


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*words) -> the JSON object that infer.py prints, run in this process."""
    def told(*words):
        monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, words), "--json"])
        monkeypatch.setattr(sys, "__stdout__", sys.stdout)
        infer.main()
        *text, last = capsys.readouterr().out.splitlines()
        told.text = "\n".join(text)
        return json.loads(last)
    return told


@pytest.mark.beside
def test_infer_command(tmp_path):
    page = tmp_path / "page.html"
    code, out, err = command("infer.py", *COMMITTED, "--json", "--html", page, "--repeats", 1)
    assert code == 0, err
    result = json.loads(out)
    for arm in ("full", "sdtp"):
        answers = result[arm]["answers"]
        assert len(answers) == 6 and all(answer["right"] for answer in answers), answers
    assert result["sdtp"]["counts"][-1] < 0.36 * result["prompt_tokens"]
    assert all(answer["text"] in page.read_text() for answer in answers)


WHERE = [       # options, the questions that are read behind the prompt, where the others stand
    (("--ask", "who?"), 0, "who? The fog. who?"),
    (("--ask", "who?", "--question", "first"), 0, "who? The fog."),
    (("--ask", "who?", "--question", "last"), 1, "The fog."),
    (("--ask", "who?", "--ask", " why? "), 2, "The fog."),
    ((), 0, "The fog."),
]


@pytest.mark.parametrize("words, behind, text", WHERE, ids=str)
def test_where_a_question_stands(words, behind, text, monkeypatch):
    tokenizer, words = Tokenizer("toy"), ["--prompt", "The fog.", *words]
    monkeypatch.setattr(sys, "argv", ["infer.py", *COMMITTED, *words])
    prompt = read_prompt(infer_options(""), tokenizer)
    assert tokenizer.decode(prompt.ids) == text
    said = [tokenizer.decode(question.ids).strip() for question in prompt.questions]
    assert said == (["who?", "why?"][:behind] or [""])


def test_both_arms_draw_the_same_numbers(run):
    words = *SHORT, "--temperature", 4, "--repeats", 1, "--max-new-tokens", 9
    told, other = run(*words, "--keep", 1), run(*words, "--seed", 1)
    said, pruned, others = ([answer["text"] for answer in each["answers"]] for each in (
        told["full"], told["sdtp"], other["full"]))
    assert said == pruned != others


@pytest.mark.parametrize("left, kept", [(0.4, 80), (100, 100), (1, 200), (1000, 200)])
def test_how_much_is_left_in_the_users_terms(left, kept, run):
    text = "fog " * 199                             # and <s>
    told = run(*COMMITTED, "--left", left, "--repeats", 1, "--max-new-tokens", 1, "--prompt", text)
    assert told["sdtp"]["counts"][-1] == kept == told["stage_of"].count(0)
    assert ("found nothing to drop" in run.text) == (kept == 200)


def test_a_question_that_is_kept_whole(run):
    """The toy's is dropped otherwise: it stands far from the end."""
    words = *SHORT, "--ask", "Anna sells maps.", "--max-new-tokens", 1, "--repeats", 1
    words += "--left", 30, "--question", "first"
    plain, kept = run(*words), run(*words, "--sink", "question")
    assert any(plain["stage_of"][4:6]) and not any(kept["stage_of"][:6])
    assert kept["schedule"]["sink"] == 6
    assert plain["sdtp"]["counts"] == kept["sdtp"]["counts"]


def test_fewer_stages_prune_as_the_first_of_all_do(run):
    words = *SHORT, "--repeats", 1, "--max-new-tokens", 2
    plain, fewer = run(*words), run(*words, "--stages", 5)
    assert fewer["schedule"]["stages"] == max(fewer["stage_of"]) == 5
    assert fewer["stage_of"] == [s if s < 6 else 0 for s in plain["stage_of"]]


def test_bench_of_random_weights(run, monkeypatch, leaves):
    """Of a model that has just as many positions as are read."""
    monkeypatch.setitem(SHAPES, "tiny", asdict(tiny_model(max_positions=65).config))
    told = run("--ckpt", "random:tiny", "--bench", 64, 40, "--max-new-tokens", 2, "--repeats", 1)
    assert [row["n"] for row in told["bench"]] == [64, 40]
    assert {"prefill_s", "decode_s", "e2e_s"} <= told["bench"][0]["sdtp"].keys()
    assert "nothing to say: use --bench" in leaves("infer.py", "--ckpt", "random:tiny")


REFUSED = [     # options of infer.py, what the one line says
    (("--prompt", " "), "the prompt is empty"),
    (("--prompt", "word " * 3000), "past this model's 2048 positions"),
    (("--row", 9999, "--data", TOY / "train.jsonl"), "train.jsonl has 20 held-out rows"),
    (("--ask", "a", "--ask", "b", "--question", "both"), "several questions are asked last"),
    (("--first", 1), "predictors stand after blocks"),
    (("--keep", 0), "keep lies in"),
    (("--prompt-file", "tests"), "tests: no such prompt file"),
    (("--prompt", "a", "--data", "b"), "leave all but one out"),
    (("--temperature", "nan"), "expected 0 or more"),
    (("--bench", 64, "--temperature", 1), "--temperature does nothing with --bench, which reads"),
    (("--prompt", "a", "--row", 1), "--row does nothing without --data: leave it out"),
    (("--prompt_file", "x"), "arguments: --prompt_file x; do you mean --prompt-file?"),
    (("--max-new-tokens", -3), "expected a whole number, at least 1, not '-3'"),
    (("--left", 0), "expected a share, or a whole number of tokens"),
    (("--left", 50, "--keep", 0.5), "--keep does nothing beside --left"),
    (("--sink", "question"), "--sink question is for a question that stands first"),
    (("--sink", "question", "--bench", 64), "--sink question is for a question, not for --bench"),
    (("--tp",), "--tp and torchrun"),
]


@pytest.mark.parametrize("words, message", REFUSED)
def test_bad_input_ends_in_one_line(words, message, leaves):
    assert message in leaves("infer.py", *COMMITTED, *words)
