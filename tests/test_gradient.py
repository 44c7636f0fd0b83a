"""lab/gradient.py: what the mask's gradient is compared with."""
import json

import pytest
import torch
from conftest import command, tiny_model

from lab.gradient import answer_loss, compare, measure, unbounded_attention
from model import masked_attention
from support.data import Example


@pytest.fixture
def row(tokens):
    return Example(tokens[0], 48)


def half_hidden():
    mask = torch.ones(1, 60, dtype=torch.float64)
    mask[0, 10:40:2] = 0
    return mask


def test_both_attentions_compute_the_same_pass(row):
    model, mask = tiny_model().double(), half_hidden()
    ours, other = (answer_loss(model, row, mask, 2, attention)
                   for attention in (masked_attention, unbounded_attention))
    assert ours == pytest.approx(other.item(), abs=1e-5)


def test_the_unbounded_gradient_is_the_derivative(row):
    model, mask = tiny_model().double(), half_hidden().requires_grad_()
    answer_loss(model, row, mask, 5, unbounded_attention).backward()
    for token in (10, 20, 38):
        step = torch.zeros(1, 60, dtype=torch.float64)
        step[0, token] = 1e-4
        losses = [answer_loss(model, row, mask.detach() + sign * step, 5, unbounded_attention)
                  for sign in (-1, 1)]
        slope = (losses[1] - losses[0]) / 2e-4
        assert mask.grad[0, token] == pytest.approx(slope.item(), rel=1e-3, abs=1e-6)


def test_a_change_is_what_letting_one_token_in_does(row):
    model = tiny_model().double()
    gradients, changes = measure(model, row, 2, 5, 0)
    assert changes.shape == gradients["ours"].shape == gradients["derivative"].shape == (5,)
    assert (changes != 0).all()
    again = measure(model, row, 2, 3, 0)[1]
    assert torch.equal(again, changes[:3])
    assert not torch.equal(measure(model, row, 2, 3, 1)[1], again)


def test_a_gradient_that_is_right_but_for_its_size():
    changes = torch.tensor([1.0, -2.0, 0.5])
    found = compare({"twice": 2 * changes, "against": -changes}, changes)
    assert found["twice"] == pytest.approx({"spearman": 1.0, "cosine": 1.0, "size": 2.0})
    assert found["against"] == pytest.approx({"spearman": -1.0, "cosine": -1.0, "size": 1.0})


def test_a_gradient_of_tiny_numbers_has_a_direction():
    changes = 1e-12 * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert compare({"ours": changes}, changes)["ours"]["cosine"] == pytest.approx(1.0)


@pytest.mark.parametrize("words, message", [
    (("--after", 12), "--after 12: expected a block before the last, 12"),
    (("--data", "short"), "too few tokens may be dropped: choose a larger --min-prompt")])
def test_bad_input_ends_in_one_line(leaves, tmp_path, words, message):
    short = tmp_path / "short.jsonl"
    short.write_text('{"instruction": "Hi", "response": "Ho"}\n' * 20)
    words = [short if word == "short" else word for word in words]
    ended = leaves("lab/gradient.py", *words)
    assert ended == f"gradient.py: {message}"


@pytest.mark.beside
def test_the_command_on_the_toy():
    code, out, err = command("-m", "lab.gradient", "--limit", 1, "--tokens", 4, "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["gradient"] for row in rows] == ["ours", "derivative"]
    assert rows[0]["spearman"] > 0 and rows[0]["size"] < 100
