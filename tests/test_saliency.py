"""Eq. 3: saliency against finite differences, the reductions, rows of a data file, Figure 2's number."""
import json

import pytest
import torch

from conftest import tiny_model
from common import encode_row, examples, read_rows
from model import positions
from pictures import heat_text
from saliency import mark, reduce_saliency, saliency, sparsity


def log_likelihood(model, x, tokens, prompt_len, block):
    """T as a function of the state x that leaves `block`, written out a second time."""
    rope = model.rope(positions(tokens), tokens.shape[1])
    for b in model.blocks[block:]:
        x = b(x, rope)
    logp = model.head(model.norm(x)).log_softmax(-1)                 # in double, where Llama.logits gives fp32
    return sum(logp[0, t - 1, tokens[0, t]] for t in range(prompt_len, tokens.shape[1]))


@pytest.mark.parametrize("block", [1, 3, 6])
def test_gradient_equals_finite_difference(tokens, block):
    model = tiny_model().double()
    tokens = tokens[:1, :20]
    states, grads, _ = mark(model, tokens, 14, [block])
    x, g = states[0], grads[0]
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    for token in (0, 5, 13, 15):
        d = torch.zeros_like(x)
        d[0, token] = direction[0, token]
        eps = 1e-5
        with torch.no_grad():
            slope = (log_likelihood(model, x + eps * d, tokens, 14, block) - log_likelihood(model, x - eps * d, tokens, 14, block)) / (2 * eps)
        assert abs(slope - (g * d).sum()) < 1e-5 * max(1.0, abs(slope)), (token, slope)


def test_all_stages_in_one_pass_equal_one_at_a_time(tiny, tokens):
    together = saliency(tiny, tokens, 48, [2, 4, 5])
    assert together.shape == (3, 2, 60)
    for s, block in enumerate((2, 4, 5)):
        assert torch.allclose(together[s], saliency(tiny, tokens, 48, [block])[0], rtol=1e-4, atol=1e-6)
    assert (together[:, :, :48] > 0).all() and (together[:, :, -1] == 0).all(), "the last response token predicts nothing"


def test_reductions_on_four_tokens():
    g = torch.tensor([[[1.0, 0.0], [3.0, -4.0], [1.0, 1.0], [0.0, 0.0]]])
    x = torch.tensor([[[2.0, 9.0], [1.0, 1.0], [1.0, -1.0], [5.0, 5.0]]])
    assert reduce_saliency(g, x, "abs_dot").tolist() == [[2.0, 1.0, 0.0, 0.0]]
    assert torch.allclose(reduce_saliency(g, x, "norm_g"), torch.tensor([[1.0, 5.0, 2 ** 0.5, 0.0]]))
    assert torch.allclose(reduce_saliency(g, x, "norm_gx"), torch.tensor([[2.0, 5.0, 2 ** 0.5, 0.0]]))
    with pytest.raises(ValueError, match="unknown saliency reduction"):
        reduce_saliency(g, x, "sum")


def test_the_backbone_gets_no_gradient(tiny, tokens):
    mark(tiny, tokens, 48, [2, 4])
    assert all(p.grad is None and not p.requires_grad for p in tiny.parameters())


@pytest.mark.parametrize("prompt_len, blocks", [(0, [2]), (60, [2]), (48, []), (48, [3, 2]), (48, [0]), (48, [7])])
def test_bad_arguments(tiny, tokens, prompt_len, blocks):
    with pytest.raises(ValueError):
        mark(tiny, tokens, prompt_len, blocks)


def test_sparsity_counts_tokens_at_most_a_tenth_of_the_maximum():
    assert sparsity(torch.tensor([[10.0, 1.0, 1.1, 0.0], [1.0, 1.0, 1.0, 1.0]])).tolist() == [0.5, 0.0]


def test_heat_map_has_a_line_per_token():
    text = heat_text(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), ["one", "two\n"], color=False)
    assert text.splitlines()[1:] == ["        @@  one", "      @@    two\\n"]


class Letters:
    """A tokenizer of one token a character."""
    def encode(self, text, bos=True):
        return [1] * bos + [ord(c) for c in text]


def write_rows(path, n):
    path.write_text("".join(json.dumps({"instruction": f"q{i:02d}", "context": "c" * (i % 3), "response": "answer"}) + "\n" for i in range(n)))
    return path


def test_rows_split_and_encoding(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", 60)
    train, heldout, validation = (read_rows(path, split) for split in ("train", "heldout", "validation"))
    everything = read_rows(path)
    assert len(everything) == 60 and train == everything[:54]
    assert heldout == everything[54:55] and validation == everything[57:58], "the others have the context of a training row"
    example = encode_row(Letters(), train[2], max_response=3)
    assert example.prompt_len == 1 + len("q02\n\ncc") and len(example.tokens) == example.prompt_len + 3
    found = examples(Letters(), path, "train", min_prompt=7, max_prompt=7, context=True)
    assert [e.prompt_len for e in found] == [7] * len(found) and len(found) == 18
    with pytest.raises(ValueError, match="no train row"):
        examples(Letters(), path, "train", min_prompt=100)


@pytest.mark.parametrize("line, message", [('{"instruction": ', "line 3: not valid JSON"), ("[1]", "line 3: expected a JSON object"),
                                           ('{"instruction": "a"}', "line 3: 'response' is missing or not text"),
                                           ('{"instruction": "a", "response": "b", "context": 5}', "line 3: 'context' is missing or not text"),
                                           ('{"instruction": "\\ud800", "response": "b"}', "line 3: not valid JSON"),
                                           (b'{"instruction": "\xff", "response": "b"}', "line 3: not valid JSON .*can't decode byte 0xff"),
                                           ("[" * 100000, "line 3: not valid JSON"),
                                           ('{"instruction": "a", "response": "' + "b" * 1000001 + '"}', "line 3: 'response' has more than 1,000,000 characters")],
                         ids=["cut", "list", "no response", "number", "surrogate", "no UTF-8", "deep", "long"])
def test_malformed_line_is_named(tmp_path, line, message):
    path = write_rows(tmp_path / "d.jsonl", 2)
    path.write_bytes(path.read_bytes() + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError, match=message) as e:
        read_rows(path)
    assert str(e.value).startswith(f"{path}, ")
