"""Which kinds of machine an arm's episodes come from: of interest once they answer differently (`mixed_machines`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from qlibero.console import count_text
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
    return in_words(machines_of(records)) if is_mixed(records) else ""


def in_words(machines: Mapping[str, int]) -> str:
    """`machines_of` for people."""
    return ", ".join(f"{count_text(count, 'episode')} from {kind}" for kind, count in machines.items())
