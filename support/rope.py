"""Rotary positions of models that read longer texts than they were first trained on.

Each pair of features turns by its own angle from one position to the next. The pairs that turn
slowly have seen only a part of their circle in training; they are slowed down, so that the angles
of a longer text are known ones.
"""
import math

import torch

# A ramp (factor, first, last, size) whose every pair is divided by factor: the type `linear`.
EVERY_PAIR = (-1.0, 0.0)


def scaled(freq, llama3=None, ramp=None):
    """Radians of each pair (d/2,), the fastest first -> the slowed ones, the size of cos and sin.

    llama3: (factor, low, high, original positions). A pair that turns at least `high` times in the
    original positions stays, one of at most `low` turns is divided by factor, others are a mix.
    ramp: (factor, first, last, size). The pairs up to number `first` stay, those from `last` on are
    divided by factor; size multiplies cos and sin, and so the attention's logits by its square.
    """
    size = 1.0
    if llama3:
        factor, low, high, original = llama3
        turns = original * freq / (2 * math.pi)
        stay = (turns - low) / (high - low)
        stay = stay.clamp(0, 1)
    elif ramp:
        factor, first, last, size = ramp
        pair = torch.arange(len(freq), device=freq.device)
        slow = (pair - first) / (last - first)
        stay = 1 - slow.clamp(0, 1)
    else:
        return freq, size
    return (1 - stay) * freq / factor + stay * freq, size


def yarn_ends(head_dim, theta, original, fast, slow, truncate):
    """The first and the last pair of YaRN's ramp.

    They are those that turn `fast` and `slow` times in the original positions; with truncate they
    are whole numbers.
    """
    def pair(turns):
        return head_dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    first, last = pair(fast), pair(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001               # a step, with nothing divided by 0
    return float(first), float(last)


def yarn_size(factor, above=1.0, below=0.0):
    """What YaRN multiplies cos and sin by, above and below being its mscale and mscale_all_dim."""
    growth = 0.1 * math.log(max(factor, 1.0))
    return (above * growth + 1.0) / (below * growth + 1.0)
