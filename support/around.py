"""A token's numbers and those of the tokens around it (beyond the paper)."""
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


def mean_around(x, pos, there=None, reach=16):
    """The mean of x over the tokens at most `reach` positions away: (B, n, C) -> (B, n, C).

    pos (B, n): increasing positions, ragged or not. there (B, n): what is 0 in it is not counted.
    A running sum, in fp64: two of its values give a window's. So it is O(n), and as exact as x.
    """
    m = torch.ones_like(x[..., :1]) if there is None else (there > 0)[..., None]
    pos = pos.contiguous()                  # else searchsorted warns
    first = torch.searchsorted(pos, pos - reach)
    past = torch.searchsorted(pos, pos + reach, right=True)
    both = torch.cat((x * m, m.to(x.dtype)), dim=-1)            # (B, n, C + 1) values, then counts
    running = F.pad(both.double().cumsum(1), (0, 0, 1, 0))      # (B, n + 1, C + 1)
    ends = (i[..., None].expand(both.shape) for i in (past, first))
    upper, lower = (running.gather(1, i) for i in ends)
    sums, counts = (upper - lower).split((x.shape[-1], 1), dim=-1)
    return (sums / counts.clamp(min=1)).to(x.dtype)
