"""Beyond the paper: a schedule that keeps any share of the prompt at each stage, not r^s."""
from dataclasses import dataclass, replace

from prune import Schedule
from support.files import need


@dataclass(frozen=True)
class SharedSchedule(Schedule):
    """A Schedule whose stage s keeps shares[s - 1] of the prompt, never rising; keep is not used.

    Raises ValueError where a stage has no share.
    """
    shares: tuple = ()

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "shares", tuple(self.shares))
        falling = sorted(self.shares, reverse=True)
        need(len(falling) >= self.stages and list(self.shares) == falling
             and all(0 < share <= 1 for share in falling),
             f"{self}: shares are one number in (0, 1] for each stage, never rising")

    def share(self, stage):
        """The share of the prompt that stage 1, 2, ... keeps; stage 0 is the whole prompt."""
        return self.shares[stage - 1] if stage else 1.0


def with_shares(schedule, shares):
    """The same places and protected tokens, other shares."""
    return SharedSchedule(schedule.first, schedule.step, schedule.stages, schedule.keep,
                          schedule.sink, schedule.local, tuple(shares))


MANY = 10**6        # tokens of a prompt so long that no protected one matters


def one_cut(schedule, blocks):
    """One stage, after the same block as the schedule's first, that costs as much.

    It leaves what the schedule leaves in the mean of the blocks behind it. A schedule without
    stages stays.
    """
    after = schedule.after(blocks)
    if not after:
        return schedule
    behind = schedule.counts(MANY, blocks)[after[0]:]
    keep = sum(behind) / len(behind) / MANY
    return replace(schedule, stages=1, keep=keep)
