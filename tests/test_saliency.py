"""saliency.py: Eq. 3 against finite differences, the reductions, Figure 2's number, the command."""
import json

import pytest
import torch

from conftest import close, command, tiny_model
from saliency import mark, reduce_saliency, saliency, sparsity


def log_likelihood(model, x, tokens, prompt_len, block):
    """T as a function of the state x that leaves `block`, written out a second time."""
    N = tokens.shape[1]
    rope = model.rope(torch.arange(N)[None], N)
    for b in model.blocks[block:]:
        x = b(x, rope)
    logits = model.head(model.norm(x))      # in double; Llama.logits gives fp32
    told = logits.log_softmax(-1)[0, prompt_len - 1:-1]
    return told.gather(1, tokens[0, prompt_len:, None]).sum()


@pytest.mark.parametrize("block", [1, 3, 6])
@torch.no_grad()
def test_gradient_equals_finite_difference(tokens, block):
    model, tokens = tiny_model().double(), tokens[:, :20]
    (x,), (g,), _ = mark(model, tokens, 14, [block])
    by_hand = (g * x).square().sum(-1).sqrt().float()
    assert torch.allclose(saliency(model, tokens, 14, [block]), by_hand)
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.double)
    for token in (0, 5, 13, 15):
        d = torch.zeros_like(x)
        d[0, token] = direction[0, token]
        up, down = (log_likelihood(model, x + eps * d, tokens, 14, block) for eps in (1e-5, -1e-5))
        slope = (up - down) / 2e-5
        error = slope - (g * d).sum()
        assert abs(error) < 1e-5 * max(1.0, abs(slope)), (token, slope)


def test_all_stages_in_one_pass_equal_one_at_a_time_and_the_backbone_gets_nothing(tiny, tokens):
    together = saliency(tiny, tokens, 48, [2, 4, 5])
    assert together.shape == (3, 60)
    for s, block in enumerate((2, 4, 5)):
        alone = saliency(tiny, tokens, 48, [block])[0]
        assert torch.allclose(together[s], alone, rtol=1e-4, atol=1e-6)
    assert (together[:, :48] > 0).all()
    assert (together[:, -1] == 0).all(), "the last response token predicts nothing"
    assert all(p.grad is None and not p.requires_grad for p in tiny.parameters())
    _, _, logits = mark(tiny, tokens, 48, [2])
    assert close(logits, tiny(tokens)[:, 47:-1], 1e-5)


def test_reductions_of_one_token():
    """Of many, against numbers one by one: saliency in tests/test_exercises.py."""
    g, x = torch.tensor([[[3.0, -4.0]]]), torch.tensor([[[2.0, 2.0]]])
    for name, want in {"abs_dot": 2, "norm_g": 5, "norm_gx": 10}.items():
        assert reduce_saliency(g, x, name).tolist() == [[want]]
    with pytest.raises(ValueError, match="reduction 'sum'"):
        reduce_saliency(g, x, "sum")


@pytest.mark.parametrize("prompt_len", [0, 60])
def test_a_prompt_and_a_response_are_needed(tiny, tokens, prompt_len):
    with pytest.raises(ValueError, match="marking needs a prompt and a response"):
        mark(tiny, tokens, prompt_len, [2])


def test_sparsity_counts_tokens_at_most_a_tenth_of_the_maximum():
    s = torch.tensor([[10.0, 1.0, 1.1, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert sparsity(s).tolist() == [0.5, 0.0]


@pytest.mark.parametrize("figure, words", [
    (1, ("--prompt", "Anna sells maps.", "--response", "maps")), (2, ("--limit", 1))])
def test_the_command_tells_the_figure(figure, words):
    code, out, err = command("saliency.py", "--figure", figure, *words, "--json")
    assert code == 0, err
    told = json.loads(out)
    if figure == 1:
        assert [len(row) for row in told["saliency"]] == 12 * [len(told["tokens"])]
    else:
        assert len(told["sparsity"]) == 12 and all(0 < s < 1 for s in told["sparsity"])


def test_a_prompt_without_its_response_is_refused(leaves):
    assert "--prompt needs --response" in leaves("saliency.py", "--prompt", "a")
