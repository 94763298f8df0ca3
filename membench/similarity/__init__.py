"""Similarity of images: exact neighbour search, normalised L2 and SSCD, and the matches file."""

from membench.similarity.flips import (
    merge,
    nearest_with_flips,
    tally_with_flips,
    within_with_flips,
)
from membench.similarity.index import Index
from membench.similarity.matches import Matches, Reference, match
from membench.similarity.measures import MEASURES, NL2, SSCD, Band, Measure, nl2, sscd
from membench.similarity.ranges import Tally, tally, within
from membench.similarity.search import Neighbours, nearest

__all__ = [
    "MEASURES",
    "NL2",
    "SSCD",
    "Band",
    "Index",
    "Matches",
    "Measure",
    "Neighbours",
    "Reference",
    "Tally",
    "match",
    "merge",
    "nearest",
    "nearest_with_flips",
    "nl2",
    "sscd",
    "tally",
    "tally_with_flips",
    "within",
    "within_with_flips",
]
