"""Digests of contents: the same content has the same digest in every process and release.

Fingerprints, ground truths and the names of cached files are compared with recorded digests, so
what these functions return must never change.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def digest(value: object) -> str:
    """SHA-256 of a value's content: tensors, arrays, images, text, numbers, nested.

    Example:
        >>> digest({"a": torch.ones(2)}) == digest({"a": torch.ones(2)})
        True
        >>> digest(torch.ones(2)) == digest(torch.ones(2, dtype=torch.float64))
        False
    """
    sha = hashlib.sha256()
    _feed(sha, value, set())
    return sha.hexdigest()


def source_digest(kind: type) -> str | None:
    """Digest of a class's source code, so that edited code does not reuse an old result.

    Returns:
        16 hexadecimal digits; None where there is no source, as in some notebooks.
    """
    return _source_digest(kind)


@lru_cache(maxsize=256)  # to find a class, Python parses the whole of its file
def _source_digest(kind: Hashable) -> str | None:
    try:
        return hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()[:16]  # type: ignore[arg-type]
    except (OSError, TypeError):
        return None


def script_digest(script: str) -> str:
    """SHA-256 of a script or style in base64, as a page's content security policy names it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def integer_digest(values: Tensor) -> int:
    """Digest of a tensor's bytes as a signed 64-bit integer."""
    short = hashlib.blake2b(values.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(short, "little", signed=True)


def _feed(sha: hashlib._Hash, value: object, parents: set[int]) -> None:
    """Add ``value`` to the hash. Each part is preceded by its type, so no two values read alike."""
    sha.update(f"<{type(value).__name__}>".encode())
    if isinstance(value, Tensor):
        value = value.detach()
        dense = value if value.layout == torch.strided else value.to_dense()
        flat = dense.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        sha.update(f"{value.dtype.str}{value.shape}".encode())
        sha.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, (bytes, bytearray)):
        sha.update(f"{len(value)}:".encode())
        sha.update(value)
    elif value is None or isinstance(value, (bool, int, float, complex, str)):
        text = repr(value)
        sha.update(f"{len(text)}:{text}".encode(errors="surrogatepass"))
    elif id(value) in parents:
        sha.update(b"cycle")
    else:
        parts = _parts(value)
        if parts is not None:
            sha.update(f"{len(parts)}:".encode())
            for part in parts:
                _feed(sha, part, parents | {id(value)})


def _parts(value: object) -> Sequence[object] | None:
    """What a composite value consists of; None for an object without content."""
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(digest, value))
    if hasattr(value, "tobytes") and hasattr(value, "size"):  # an image, as PIL holds it
        return [getattr(value, "mode", None), value.size, value.tobytes()]
    if hasattr(value, "__dict__"):
        return [part for pair in vars(value).items() for part in pair]
    return None
