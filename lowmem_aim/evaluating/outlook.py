"""The cost of log-likelihoods, told before work."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem_aim.units import counted, shown


@dataclass(frozen=True)
class Outlook:
    """The cost of answering the requests of all tasks."""

    requests: int
    known: int  # of these, from an earlier run
    sequences: int  # that are read for the others: requests that read the same share one
    tokens: int  # of these sequences
    computed: int  # of these tokens: common beginnings count once
    rounds: int
    stored: int  # bytes of the model on disk
    least: int  # bytes of memory, of the device if that has its own, without which it does not run
    there: int  # bytes of memory that it may take

    def __str__(self) -> str:
        """The figures as one line for people."""
        known = f", {self.known} of them answered before" if self.known else ""
        times = f", {self.rounds} times" if self.rounds > 1 else ""
        return (
            f"log-likelihoods: {counted(self.requests, 'request')}{known}; {counted(self.sequences, 'text')} with "
            f"{self.tokens} tokens, {self.computed} after sharing, in {counted(self.rounds, 'round')}; at most "
            f"{shown(self.stored)} are read from disk{times}; takes at least {shown(self.least)} of memory, of "
            f"{shown(self.there)}"
        )
