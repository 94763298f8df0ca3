"""Similarity of images: exact neighbour search, normalised L2 and SSCD, and the matches file."""

from membench.similarity.matches import Matches, Reference, match
from membench.similarity.measures import MEASURES, NL2, SSCD, Band, Measure, nl2, sscd
from membench.similarity.search import Neighbours, nearest

__all__ = [
    "MEASURES",
    "NL2",
    "SSCD",
    "Band",
    "Matches",
    "Measure",
    "Neighbours",
    "Reference",
    "match",
    "nearest",
    "nl2",
    "sscd",
]
