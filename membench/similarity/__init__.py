"""Similarity of images: exact neighbour search, normalised L2, and the matches file."""

from membench.similarity.flips import (
    merge,
    nearest_with_flips,
    tally_with_flips,
    within_with_flips,
)
from membench.similarity.matches import Matches, match, nl2
from membench.similarity.ranges import Tally, tally, within
from membench.similarity.search import Neighbours, nearest

__all__ = [
    "Matches",
    "Neighbours",
    "Tally",
    "match",
    "merge",
    "nearest",
    "nearest_with_flips",
    "nl2",
    "tally",
    "tally_with_flips",
    "within",
    "within_with_flips",
]
