"""checkpoints/toy.py: what it writes is what is committed, and what it measures is so.

Pretraining takes 22 minutes and is not run here: only that a step learns.
"""
import random

import torch

from checkpoints import toy
from conftest import TOY
from model import Tokenizer, load
from prune import Schedule, load_predictors
from support.config import read_config


def test_the_committed_files_are_those_that_the_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "TOY", tmp_path)
    toy.make_tokenizer(0)
    toy.write(load("toy", device="cpu"), 0)
    for name in ("tokenizer.model", "train.jsonl", "model.safetensors", "chat_template.jinja",
                 "demo.json"):
        assert (tmp_path / name).read_bytes() == (TOY / name).read_bytes(), name
    assert read_config(tmp_path / "config.json") == read_config(TOY / "config.json")


def test_measured_answers_and_the_places_of_the_facts_that_are_asked_for():
    model, tokenizer, rng = load("toy", device="cpu"), Tokenizer("toy"), random.Random(0)
    predictors, metadata = load_predictors(TOY, model)
    prompts = [toy.fresh_prompt(rng, tokenizer, 300) for _ in range(6)]
    for tokens, prompt_len, asked in prompts:
        ids = tokens[0].tolist()
        answer = tokenizer.decode(ids[prompt_len:])
        told = tokenizer.decode([ids[place] for place in asked])
        assert sorted(told.split()) == sorted(answer.split())       # perhaps in another order
        assert prompt_len >= 300 and ids[0] == tokenizer.prefix
    schedule, found = Schedule(**metadata["schedule"]), {}
    for name in ("full", "predictor", "recent"):
        found[name] = toy.measure(name, model, prompts, schedule, predictors, quiet=True)
    assert found["full"]["value"] >= 5 / 6 and found["full"]["fact_tokens_kept"] == 1
    assert found["recent"]["value"] < found["predictor"]["value"]
    assert found["recent"]["fact_tokens_kept"] < found["predictor"]["fact_tokens_kept"] < 1


def test_rows_of_pretraining_carry_the_loss_where_it_belongs():
    tokenizer, rng = Tokenizer("toy"), random.Random(0)
    copied = toy.copy_row(rng, [5, 6, 7], 0)
    assert [weight for _, weight in copied] == [0.0] * 16 + [1.0] * 48
    assert copied[16][0] == copied[0][0] and len(copied) == 64
    for level, (length, *_) in enumerate(toy.LEVELS):
        row = toy.story_row(rng, tokenizer.inner.sp, level)
        assert len(row) == length and row[0] == (1, toy.BACKGROUND)
        assert "sells" in tokenizer.decode([token for token, weight in row if weight == 1])


def test_the_step_of_a_matrix_is_that_of_torchs_muon():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.ParameterList(torch.zeros(n, 32) for n in (16, 48)) for _ in "ab")
    here, there = toy.Muon(ours, 1.0), torch.optim.Muon(theirs, 1.0, weight_decay=0.0)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        here.step()
        there.step()
    for p, q in zip(ours, theirs):
        assert (p - q).norm() < 0.02 * q.norm()         # theirs computes in bfloat16


def test_a_step_of_pretraining_learns():
    tokenizer, rng = Tokenizer("toy"), random.Random(0)
    torch.manual_seed(0)
    model = toy.fresh_model(tokenizer.inner.sp)
    optimizers = toy.make_optimizers(model)
    rows = torch.tensor([toy.copy_row(rng, range(300, 340), 0) for _ in range(4)])
    tokens, weight = rows[..., 0].long(), rows[..., 1]
    losses = [toy.learn(model, optimizers, 0.3, tokens, weight)[0] for _ in range(6)]
    assert losses[-1] < losses[0] - 1
    assert model.config == load("toy", device="cpu").config
