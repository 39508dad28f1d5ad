"""Which of an origin's files belong to the model: include, exclude, and what to do with pickled weights.

Owns these rules, the same for every kind of origin. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from cached.config import SourceSettings
from cached.model import ErrorKind, Ref, Revision, permanent

_PICKLED = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


def select(paths: Iterable[str], settings: SourceSettings, ref: Ref) -> frozenset[str]:
    """The paths that are to be fetched.

    Raises CachedError: NOT_FOUND ``NO_FILES`` where the globs leave none, PERMISSION_DENIED ``ONLY_PICKLE``
    where pickled weights, which run code when they are loaded, are all the weights there are.
    """
    listed = frozenset(paths)
    chosen = frozenset(path for path in listed if _chosen(path, settings))
    if listed and not chosen:
        raise permanent(
            ErrorKind.NOT_FOUND,
            "NO_FILES",
            f"{ref}: include and exclude of source {settings.prefix!r} leave none of {len(listed)} files",
            "correct the globs in the configuration",
        )
    pickled = frozenset(path for path in chosen if PurePosixPath(path).suffix.lower() in _PICKLED)
    if settings.allow_pickle or not pickled:
        return chosen
    if not any(path.endswith(".safetensors") for path in chosen):
        raise permanent(
            ErrorKind.DENIED,
            "ONLY_PICKLE",
            f"{ref} has its weights only as pickles, which run code when they are loaded: {min(pickled)}",
            "have it converted to safetensors, or allow it: a [[source]] table with this prefix and "
            "allow_pickle = true",
        )
    return chosen - pickled


def check_attested(revision: Revision, settings: SourceSettings) -> None:
    """Raises CachedError (PERMISSION_DENIED ``NOT_ATTESTED``) where a required digest is missing."""
    if not settings.require_digest:
        return
    bare = [spec.path for spec in revision.files if not spec.attested]
    if bare:
        raise permanent(
            ErrorKind.DENIED,
            "NOT_ATTESTED",
            f"{revision.ref}: the origin publishes no digest of {bare[0]}"
            + (f" and {len(bare) - 1} more files" if len(bare) > 1 else ""),
            "have it publish them (a SHA256SUMS beside the files, say), or take require_digest off "
            f"source {settings.prefix!r}",
        )


def _chosen(path: str, settings: SourceSettings) -> bool:
    included = not settings.include or _matches(path, settings.include)
    return included and not _matches(path, settings.exclude)


def _matches(path: str, globs: tuple[str, ...]) -> bool:
    """A glob without a slash is about the name in any folder, one that ends in a slash about all below."""
    name = path.rpartition("/")[2]
    return any(
        fnmatchcase(path if "/" in glob else name, glob + "*" if glob.endswith("/") else glob)
        for glob in globs
    )
