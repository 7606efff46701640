"""Write samples as WebDataset shards: the same samples give the same bytes."""

import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from webdataset import ShardWriter

from data.index import build_index, write_index

_EXTENSION = re.compile(r"[a-z0-9][a-z0-9_.-]*")


def write_shards(samples: Iterable[Mapping[str, bytes | str]], pattern_prefix: Path, *, max_samples: int) -> list[Path]:
    """Write ``PREFIX-00000.tar``, ``PREFIX-00001.tar``, ... and an index beside each.

    The shards are written aside and appear under their names when all of them are whole, so a failure (of
    ``samples``, too) leaves nothing behind.

    Args:
        samples: each has the string ``__key__`` and, by extension (``"png"``), its members' bytes. Keys may have
            folders (``"cats/0001"``) and must be unique; dots are refused, as WebDataset cuts names there.
        pattern_prefix: folder and start of the shards' names; the folder is made if need be.
        max_samples: samples per shard; the last one has the rest.

    Returns:
        The shards' paths, in order.

    Raises:
        ValueError: no samples, ``max_samples`` below 1, or a key or extension that readers would not give back
            as it is.
        TypeError: a key that is no string or a member that is not bytes.
        FileExistsError: the folder already has shards of this prefix.
    """
    if max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, not {max_samples}")
    folder, prefix = pattern_prefix.parent.absolute(), pattern_prefix.name
    folder.mkdir(parents=True, exist_ok=True)
    # Fewer shards than last time would leave the last ones of that time in place, to be read with the new ones.
    for path in sorted(folder.iterdir()):
        if re.fullmatch(re.escape(prefix) + r"-\d+\.tar", path.name):
            raise FileExistsError(f"{path}: already there; remove the shards of this prefix or choose another")

    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{prefix}-") as scratch:
        with ShardWriter(
            scratch.replace("%", "%%") + "/%05d.tar",
            maxcount=max_samples,
            maxsize=math.inf,
            verbose=0,
            encoder=False,
            format="PAX_FORMAT",  # for names of any length
            mtime=0,
            user="",
            group="",
            mode=0o644,
        ) as writer:
            for sample in _checked(samples):
                writer.write(sample)
            if writer.total == 0:
                raise ValueError(f"{pattern_prefix}: no samples to write")
        parts = sorted(Path(scratch).iterdir())
        shards = [part.rename(pattern_prefix.with_name(f"{prefix}-{part.name}")) for part in parts]
    for shard in shards:
        write_index(build_index(shard))
    return shards


def _checked(samples: Iterable[Mapping[str, bytes | str]]) -> Iterator[Mapping[str, bytes | str]]:
    """Pass on ``samples``, refusing those that a reader would skip, merge or rename."""
    seen: set[str] = set()
    for sample in samples:
        key = sample.get("__key__")
        if not isinstance(key, str):
            raise TypeError(f"__key__ must be a string, not {key!r}")
        if not key or "." in key or key.startswith(("/", "__")) or key.endswith("/") or not key.isprintable():
            raise ValueError(
                f"key {key!r}: must be printable, without dots, and neither start with '/' or '__' nor end with '/'"
            )
        if key in seen:
            raise ValueError(f"key {key!r}: comes twice")
        seen.add(key)
        members = {extension: value for extension, value in sample.items() if extension != "__key__"}
        if not members:
            raise ValueError(f"key {key!r}: has no members")
        for extension, value in members.items():
            if not _EXTENSION.fullmatch(extension):
                raise ValueError(f"key {key!r}: extension {extension!r} must be lower case, such as 'png' or 'seg.png'")
            if not isinstance(value, bytes):
                raise TypeError(f"key {key!r}: {extension!r} must be bytes, not {type(value).__name__}")
        yield sample
