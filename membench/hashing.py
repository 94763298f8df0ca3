"""Content hashes and the seeds derived from them: the only source of identity and randomness."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: the same value always gives the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(value: Any) -> str:
    """SHA-256 (64 hex digits) of a JSON-able value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def array_hash(array: np.ndarray) -> str:
    """SHA-256 of an array's type, shape and values (row-major, little-endian)."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    for start in range(0, len(little), 4096):
        digest.update(np.ascontiguousarray(little[start : start + 4096]).tobytes())
    return digest.hexdigest()


def array_file_hash(path: Path) -> str:
    """`array_hash` of the array in a .npy file, read in blocks instead of mapped into memory."""
    with open(path, "rb") as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            return array_hash(np.load(path, mmap_mode="r", allow_pickle=False))
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if fortran or dtype.newbyteorder("<") != dtype:
            return array_hash(np.load(path, mmap_mode="r", allow_pickle=False))
        digest = hashlib.sha256(f"{dtype.str}{shape}".encode())
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed from anything JSON-able: `derive_seed(0, "image", 17)`."""
    return int(content_hash(list(parts))[:16], 16) >> 1
