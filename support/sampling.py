"""How a text goes on: how many tokens there is room for, which one is next, and what ends it."""
import operator

import torch

from support.files import need


def one_past(config, n, new, which=""):
    """One past the last position read for `new` tokens after a prompt of n: the last is not read.

    which: said before the message of the ValueError where these are too many for the model.
    """
    need(isinstance(new, int) and new > 0,
         f"max_new_tokens is {new!r}: expected a whole number, at least 1")
    end, limit = n + new - 1, config.max_positions
    need(end <= limit, f"{which}with {n} prompt tokens and {new} new ones position {end - 1} is "
                       f"beyond this model's {limit} positions; use a shorter prompt or fewer new "
                       "tokens")
    return end


def fitting(config, longest, asked, default):
    """How many new tokens: those asked for, else as many of `default` as fit behind the longest.

    Raises ValueError where those asked for, or a single one, do not fit.
    """
    limit = config.max_positions
    new = asked or max(1, min(default, limit - longest + 1))
    one_past(config, longest, new)
    if not asked and new < default:
        print(f"new tokens: {new} instead of {default}, because behind {longest} prompt tokens no "
              f"more fit into this model's {limit} positions")
    return new


def ends(model, eos):
    """The token ids that end a text, a tuple: the model's, or those given, one or several."""
    if eos is None:
        return model.config.eos
    try:
        return (eos,) if isinstance(eos, int) else tuple(map(operator.index, eos))
    except TypeError:
        raise ValueError(f"eos is {eos!r}: expected a token id, or several") from None


def finite(model, logits):
    """The same logits, of which each is a finite number."""
    least_most = torch.stack(logits.aminmax())      # not a number is both
    need(least_most.isfinite().all(),
         f"{model.source}: the logits are not finite in {model.dtype}: the weights are damaged, or "
         "too large for float16")
    return logits


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
