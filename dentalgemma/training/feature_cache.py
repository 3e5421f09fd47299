"""A folder of features, memory-mapped: written a shard at a time, read by name, refused under another key.

One folder holds `key.json` and `*.safetensors`, each entry a picture as (image tokens, width); every shard repeats the
key in its header, beside a checksum of each picture. Features show a patient as much as a radiograph does: the folder
is made for its owner alone (mode 0700). Whoever must delete a picture deletes the caches made from it as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from data_builders.records import InputError
from dentalgemma.training.checkpoints import is_disk_full
from dentalgemma.weight_files import open_weights

KEY_FILE = "key.json"
CHECKSUMS = "crc32"  # in a shard's metadata: JSON, CRC-32 of each picture's values by its name
SHOWN = 4  # fields in which keys differ
LIVE = "or set --vision_features live"


class CacheError(InputError):
    """A feature cache that cannot be used, made or filled; the message says why and what to do."""


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Where two keys differ, a few words for each field."""
    names = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    return [f"{name} is {_brief(there.get(name))} there and {_brief(here.get(name))} here" for name in names]


def describe_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Where two keys differ, as a sentence; of another model nearly every field does, and a few tell it."""
    found = differences(there, here)
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "; ".join(found[:SHOWN] + more)


def _brief(value: object) -> str:
    text = "not set" if value is None else str(value)
    return f"{text[:10]}…" if len(text) > 40 else text


def read_key(text: str) -> dict[str, Any]:
    """A key as it was written.

    Raises:
        ValueError: when it is none.
    """
    key = json.loads(text)
    if not isinstance(key, dict):
        raise ValueError(f"it holds no key but {_brief(key)}")
    return key


class Place(NamedTuple):
    """Where the features of a picture lie: number of the shard, first byte, image tokens; and their checksum."""

    shard: int
    start: int
    tokens: int
    checksum: int


class FeatureCache:
    """Features of pictures by name, in a folder that several processes and runs may read and fill at once.

    Raises:
        CacheError: when the folder was made under another key, or one of its shards was.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.key = json.loads(json.dumps(key))
        self.dtype = getattr(torch, self.key["stored"])
        self.width = self.key["width"]
        self.shards: list[Path] = []
        self.damaged: dict[Path, str] = {}
        self._places: dict[str, Place] = {}
        self._maps: dict[int, torch.Tensor] = {}
        self._checked: set[str] = set()
        self._open()
        self.refresh()

    def _open(self) -> None:
        path = self.folder / KEY_FILE
        try:
            if not path.is_file():
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                text = json.dumps(self.key, indent=1, sort_keys=True)
                with _finished(path) as draft:
                    draft.write_text(text, encoding="utf-8")
            found = read_key(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CacheError(
                f"feature cache {self.folder} cannot be used: its {KEY_FILE} is damaged ({error}); delete it, or the "
                f"whole folder, and start again, give another --feature_cache, {LIVE}"
            ) from error
        except OSError as error:
            raise CacheError(
                f"feature cache {self.folder} cannot be used: {error}; give another --feature_cache, {LIVE}"
            ) from error
        self._check_key(found, self.folder)

    def _check_key(self, found: Mapping[str, Any], where: Path) -> None:
        if found != self.key:
            raise CacheError(
                f"feature cache {where} is of other features: {describe_differences(found, self.key)}; give another "
                f"--feature_cache, {LIVE}"
            )

    def refresh(self) -> None:
        """Look at the folder again: what others wrote since is there, what is no whole shard is in `damaged`.

        Raises:
            CacheError: when a shard cannot be read at the moment; that says nothing against what is in it.
        """
        self.damaged = {}
        for path in sorted(set(self.folder.glob("*.safetensors")) - set(self.shards)):
            self._add(path)

    def _add(self, path: Path) -> None:
        try:
            file = open_weights(path)
            found = read_key(file.metadata["key"])
            checksums = json.loads(file.metadata[CHECKSUMS]) if CHECKSUMS in file.metadata else {}
        except InputError as error:
            if isinstance(error.__cause__, FileNotFoundError):  # another run has just set it aside
                return
            if isinstance(error.__cause__, OSError):
                raise CacheError(
                    f"feature cache {path} cannot be read at the moment: {error.__cause__}; nothing of it is lost: "
                    f"start again when it can be, give another --feature_cache, {LIVE}"
                ) from error
            self.damaged[path] = str(error)
            return
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # JSON, but not as safetensors has it
            self.damaged[path] = f"its header is damaged ({error!r})"
            return
        self._check_key(found, path)
        for name, stored in file.tensors.items():
            if stored.dtype != self.dtype or len(stored.shape) != 2 or stored.shape[1] != self.width:
                self.damaged[path] = f"{name} is not as its key says"
                return
        if not isinstance(checksums, dict) or not checksums.keys() >= file.tensors.keys():
            self.damaged[path] = "it lacks the checksums of its pictures"
            return
        for name, stored in file.tensors.items():
            self._places[name] = Place(len(self.shards), stored.start, stored.shape[0], checksums[name])
        self.shards.append(path)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getstate__(self) -> dict[str, Any]:
        """A process that is started anew looks at the folder itself: an index of millions would travel to each."""
        return {"folder": self.folder, "key": self.key}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def tokens(self, name: str) -> int:
        """How many image tokens a picture fills, its crops included."""
        return self._place(name).tokens

    def missing(self, names: Iterable[str]) -> list[str]:
        """Which of these are not there, each once, in their order."""
        return [name for name in dict.fromkeys(names) if name not in self._places]

    def read(self, names: Sequence[str]) -> torch.Tensor:
        """The features of pictures one after the other, copied from the maps: (sum of their tokens, width).

        Raises:
            CacheError: for a picture that is not there, or is not as it was written.
        """
        places = [self._place(name) for name in names]
        features = torch.empty(sum(place.tokens for place in places), self.width, dtype=self.dtype)
        row = 0
        for name, place in zip(names, places, strict=True):
            last = place.start + place.tokens * self.width * self.dtype.itemsize
            content = self._map(place.shard)[place.start : last]
            self._check_content(name, content)
            features[row : row + place.tokens] = content.view(self.dtype).view(place.tokens, self.width)
            row += place.tokens
        return features

    def _check_content(self, name: str, content: torch.Tensor) -> None:
        """Compare a picture with its checksum, the first time that this process reads it."""
        if name in self._checked:
            return
        place = self._places[name]
        if zlib.crc32(content.numpy()) != place.checksum:
            raise CacheError(
                f"feature cache {self.shards[place.shard]} is damaged: picture {name[:16]}… is not as it was written; "
                f"delete this file and start again, {LIVE}"
            )
        self._checked.add(name)

    def write(self, features: Mapping[str, torch.Tensor]) -> None:
        """Add pictures, each as (its image tokens, width), in one more shard, there in full or not at all.

        Raises:
            CacheError: when the disk is full, or the system allows no file so large.
        """
        if not features:
            return
        tensors = {name: tensor.detach().to("cpu", self.dtype).contiguous() for name, tensor in features.items()}
        sums = {name: zlib.crc32(tensor.view(torch.uint8).numpy()) for name, tensor in sorted(tensors.items())}
        metadata = {"key": json.dumps(self.key, sort_keys=True), CHECKSUMS: json.dumps(sums)}
        # Named by its content: a shard is never replaced by another while somebody reads it.
        path = self.folder / f"{hashlib.sha256(metadata[CHECKSUMS].encode()).hexdigest()[:32]}.safetensors"
        try:
            with _finished(path) as draft:
                save_file(tensors, draft, metadata=metadata)
        except Exception as error:
            if not is_disk_full(error):
                raise
            raise CacheError(
                f"features cannot be written to {self.folder}: {error}; make room, or lift the limit, and start again "
                f"(what is written stays), give another --feature_cache, {LIVE}"
            ) from error
        self._add(path)

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise CacheError(f"feature cache {self.folder} lacks picture {name[:16]}…; encode it first, {LIVE}")
        return self._places[name]

    def _map(self, shard: int) -> torch.Tensor:
        """The bytes of a shard; torch closes the file once it is mapped, so that many shards take no handles."""
        if shard not in self._maps:
            path = self.shards[shard]
            try:
                self._maps[shard] = torch.from_file(
                    str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8
                )
            except (OSError, RuntimeError) as error:
                raise CacheError(f"feature cache {path} cannot be read any more: {error}") from error
        return self._maps[shard]


@contextmanager
def _finished(path: Path) -> Iterator[Path]:
    """A file to write that takes its name once all of it is on the disk."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
