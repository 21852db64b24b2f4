"""Which kinds of machine an arm's episodes come from: of interest once they answer differently (`mixed_machines`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from qlibero.results.records import EpisodeRecord


def is_mixed(records: Iterable[EpisodeRecord]) -> bool:
    """Whether the policy answered its probe in more than one way among these episodes."""
    return len({record.probe for record in records if record.probe}) > 1


def machines_of(records: Iterable[EpisodeRecord]) -> dict[str, int]:
    """{kind of machine: episodes}, the most frequent first; "not recorded" for lines of earlier versions."""
    return dict(Counter(record.machine or "not recorded" for record in records).most_common())


def mix_in_words(records: Iterable[EpisodeRecord]) -> str:
    """One sentence where an arm's episodes come from machines that answer differently, "" otherwise."""
    records = list(records)
    if not is_mixed(records):
        return ""
    return ", ".join(f"{count} episodes from {kind}" for kind, count in machines_of(records).items())
