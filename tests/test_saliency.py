"""saliency.py: Eq. 3 against finite differences, the reductions, Figure 2's number, the command."""
import json

import pytest
import torch

from conftest import command, tiny_model
from lab.figures import heat_text
from model import positions
from saliency import IGNORE, mark, reduce_saliency, response_labels, saliency, sparsity


def log_likelihood(model, x, tokens, prompt_len, block):
    """T as a function of the state x that leaves `block`, written out a second time."""
    rope = model.rope(positions(tokens), tokens.shape[1])
    for b in model.blocks[block:]:
        x = b(x, rope)
    logits = model.head(model.norm(x))      # in double; Llama.logits gives fp32
    told = logits.log_softmax(-1)[0, prompt_len - 1:-1]
    response = tokens[0, prompt_len:, None]
    return told.gather(1, response).sum()


@pytest.mark.parametrize("block", [1, 3, 6])
@torch.no_grad()
def test_gradient_equals_finite_difference(tokens, block):
    model = tiny_model().double()
    tokens = tokens[:1, :20]
    states, grads, _ = mark(model, tokens, 14, [block])
    x, g = states[0], grads[0]
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.double)
    eps = 1e-5
    for token in (0, 5, 13, 15):
        d = torch.zeros_like(x)
        d[0, token] = direction[0, token]
        up = log_likelihood(model, x + eps * d, tokens, 14, block)
        down = log_likelihood(model, x - eps * d, tokens, 14, block)
        slope = (up - down) / (2 * eps)
        error = slope - (g * d).sum()
        assert abs(error) < 1e-5 * max(1.0, abs(slope)), (token, slope)


def test_all_stages_in_one_pass_equal_one_at_a_time(tiny, tokens):
    together = saliency(tiny, tokens, 48, [2, 4, 5])
    assert together.shape == (3, 2, 60)
    for s, block in enumerate((2, 4, 5)):
        alone = saliency(tiny, tokens, 48, [block])[0]
        assert torch.allclose(together[s], alone, rtol=1e-4, atol=1e-6)
    assert (together[:, :, :48] > 0).all()
    assert (together[:, :, -1] == 0).all(), "the last response token predicts nothing"


def test_reductions_on_four_tokens():
    g = torch.tensor([[1.0, 0.0], [3.0, -4.0], [1.0, 1.0], [0.0, 0.0]])[None]
    x = torch.tensor([[2.0, 9.0], [1.0, 1.0], [1.0, -1.0], [5.0, 5.0]])[None]
    abs_dot, norm_g, norm_gx = (reduce_saliency(g, x, name)[0].tolist()
                                for name in ("abs_dot", "norm_g", "norm_gx"))
    assert abs_dot == [2.0, 1.0, 0.0, 0.0]
    assert norm_g == pytest.approx([1.0, 5.0, 2 ** 0.5, 0.0])
    assert norm_gx == pytest.approx([2.0, 5.0, 2 ** 0.5, 0.0])
    with pytest.raises(ValueError, match="unknown saliency reduction"):
        reduce_saliency(g, x, "sum")


def test_labels_are_the_responses_and_neither_prompt_nor_padding():
    tokens = torch.arange(10, 22).view(2, 6)
    labels = response_labels(tokens, [3, 2], [6, 4])
    assert labels.tolist() == [[IGNORE, 13, 14, 15], [18, 19, IGNORE, IGNORE]]
    assert response_labels(tokens, 4).tolist() == [[14, 15], [20, 21]]


def test_the_backbone_gets_no_gradient(tiny, tokens):
    mark(tiny, tokens, 48, [2, 4])
    assert all(p.grad is None for p in tiny.parameters())
    assert not any(p.requires_grad for p in tiny.parameters())


NO_PROMPT = "marking needs a prompt and a response"
BAD_STAGES = "expected increasing numbers from 1 to 6"


@pytest.mark.parametrize("prompt_len, blocks, message", [
    (0, [2], NO_PROMPT),
    (60, [2], NO_PROMPT),
    (48, [], BAD_STAGES),
    (48, [3, 2], BAD_STAGES),
    (48, [0], BAD_STAGES),
    (48, [7], BAD_STAGES),
])
def test_bad_arguments(tiny, tokens, prompt_len, blocks, message):
    with pytest.raises(ValueError, match=message):
        mark(tiny, tokens, prompt_len, blocks)


def test_sparsity_counts_tokens_at_most_a_tenth_of_the_maximum():
    s = torch.tensor([[10.0, 1.0, 1.1, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert sparsity(s).tolist() == [0.5, 0.0]


def test_heat_map_has_a_line_per_token():
    s = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    text = heat_text(s, ["one", "two\n"], color=False)
    assert text.splitlines()[1:] == ["        @@  one", "      @@    two\\n"]


# ------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("figure", [1, 2])
def test_the_command_draws_the_figure(figure):
    code, out, err = command("saliency.py", "--figure", figure, "--limit", 2, "--json")
    assert code == 0, err
    assert json.loads(out)["figure"] == figure


def test_a_prompt_without_its_response_is_refused(leaves):
    ended = leaves("saliency.py", "--prompt", "a")
    assert ended == ("saliency.py: --prompt needs --response: saliency is the gradient of the "
                     "response's log-likelihood")


def test_a_row_below_zero_is_refused(leaves, capsys):
    assert leaves("saliency.py", "--row", -1) == 2
    assert "expected a whole number, at least" in capsys.readouterr().err
