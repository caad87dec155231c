"""What is wrong with a file, tensor by tensor, and how a person reads it: one sentence for each kind of fault.

A file of a large model that is wrong is wrong hundreds of times in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN_FAULTS = 2000
"""The most faults that are listed one by one."""
SHOWN_KINDS = 10
"""The most kinds of fault that a message tells."""
SHOWN_EXAMPLES = 3
"""The most names that it tells of each kind."""
TOLD_WHOLE = 2
"""Up to so many faults of a kind are told by their own sentences."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`448 tensors have dtype F64; F32, F16, BF16 are served: NAME, NAME, NAME and 445 more. Cast them to float32.`"""

    sentence: str
    """The whole sentence, where the fault is the only one of its kind."""
    kind: str = ""
    """What faults of a kind have in common, to be read after their number; empty for a fault that is like no other."""
    example: str = ""
    """The fault as one item of the list behind a colon."""
    remedy: str = ""
    """A sentence: what to do about all of them."""
    misfit: bool = False
    """The base lacks something, or has it in another shape: on another base it might be no fault."""


def listed(faults: Sequence[Fault]) -> tuple[str, ...]:
    """One sentence each; of thousands, the first and a count of the rest."""
    sentences = tuple(fault.sentence for fault in faults[:SHOWN_FAULTS])
    left = len(faults) - len(sentences)
    return (*sentences, f"{left} more faults are not listed.") if left else sentences


def summary(faults: Sequence[Fault]) -> str:
    """One sentence for each kind of fault, in the order in which they first occur."""
    kinds: dict[str, list[Fault]] = {}
    for fault in faults:
        kinds.setdefault(fault.kind or fault.sentence, []).append(fault)
    told = [_told(same) for same in list(kinds.values())[:SHOWN_KINDS]]
    left = sum(len(same) for same in list(kinds.values())[SHOWN_KINDS:])
    return " ".join([*told, f"{left} more faults are of other kinds."] if left else told)


def _told(same: Sequence[Fault]) -> str:
    if len(same) <= TOLD_WHOLE:
        return " ".join(fault.sentence for fault in same)
    first, left = same[0], len(same) - SHOWN_EXAMPLES
    examples = ", ".join(fault.example for fault in same[:SHOWN_EXAMPLES]) + (f" and {left} more" if left > 0 else "")
    return f"{len(same)} {first.kind}: {examples}." + (f" {first.remedy}" if first.remedy else "")
