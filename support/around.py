"""A token's number, blended with those of the tokens around it (beyond the paper)."""
import torch
import torch.nn.functional as F


def blended(values, counted, share, window=65):
    """(1 - share) * value + share * the mean of the window in whose middle the token stands.

    values (B, n) and counted, bool (B, n): the tokens that have neighbours and are some; the others
    keep their values. window: an odd number of tokens.
    """
    m = counted.to(values.dtype)
    sums = F.avg_pool1d(values * m, window, 1, window // 2)
    counts = F.avg_pool1d(m, window, 1, window // 2)        # fewer at the ends of a row
    mixed = (1 - share) * values + share * sums / counts.clamp(min=1e-9)
    return torch.where(counted, mixed, values)
