"""Similarity of images: exact neighbour search, normalised L2, and the matches file."""

from membench.similarity.matches import Matches, match, nl2
from membench.similarity.search import Neighbours, nearest

__all__ = ["Matches", "Neighbours", "match", "nearest", "nl2"]
