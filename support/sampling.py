"""How the next token is chosen from its logits."""
import torch

from support.files import need


def greedy(logits):
    """The likeliest token: (B, V) -> (B, 1)."""
    return logits.argmax(-1, keepdim=True)


def sampler(temperature, generator=None):
    """A choice of tokens, (B, V) -> (B, 1): greedy at temperature 0, else drawn."""
    need(0 <= temperature < float("inf"),
         f"temperature {temperature}: expected 0 (greedy) or more")
    if temperature == 0:
        return greedy

    def pick(logits):
        need(logits.isfinite().all(), "the logits are not finite")
        logits = logits - logits.amax(-1, keepdim=True)
        p = torch.softmax(logits / max(temperature, 1e-6), -1)
        return torch.multinomial(p, 1, generator=generator)
    return pick
