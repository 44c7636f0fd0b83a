"""Impossible arguments, refused in one line each; the modules themselves stay with the paper."""
from support.files import need


def check_blocks(blocks, n_blocks):
    """That stages stand after increasing blocks, from 1, of a model of so many."""
    known = [i for i in range(1, n_blocks + 1) if i in blocks]
    need(blocks and blocks == known,
         f"stages after blocks {blocks}: expected increasing numbers from 1 to {n_blocks}")


def check_prompts(lengths, rows, longest):
    """That a padded batch of prompts has a length for each row, none of them 0."""
    need(longest > 0, "the prompt is empty")
    need(len(lengths) == rows and min(lengths) > 0 and max(lengths) == longest,
         f"lengths {lengths} for {rows} rows of {longest}")


def check_schedule(s):
    """That a prune.Schedule has possible numbers."""
    need(s.first >= 1 and s.step >= 1 and 0 <= s.stages <= 1000,
         f"{s}: first and step count from 1, stages from 0 to 1000")
    need(0 < s.keep <= 1 and 0 <= s.local <= 1, f"{s}: keep lies in (0, 1], local in [0, 1]")
    need(0 <= s.sink < 2**30, f"{s}: sink is a number of tokens")
