"""The backbone is frozen, so it runs once per example: features kept on disk and shared by every later epoch and run.

A cache directory holds shards in ArrayRecord format, each moved into place whole. A shard's first record lists the
digests of its examples and every further record is one example's features. Examples are found by the digest of their
tokens, which covers tokenizer, template and truncation; the directory's name covers backbone, taps, entry, dtype
and which positions are kept. So a killed build goes on where it stopped, two writers at once cost only duplicated work,
and nested data sizes share their examples. Shape letters: P taps, R target tokens, D width.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Int

from spa_jax.data.encoding import Example
from spa_jax.data.pipeline import collate
from spa_jax.errors import UserError
from spa_jax.models.llama import Entry, Llama
from spa_jax.training.features import AT_TARGETS, Features, Kept, blocks_above, with_positions

FORMAT_VERSION = 1
SHARD_EXAMPLES = 256


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """The kind of features in a cache.

    Attributes:
        identity: of the backbone, see `Backbone.identity`.
        taps: which hidden states are tapped.
        hidden_size: D.
        dtype: NumPy name of the dtype of states and taps.
        kept: which features.
        entry: where corrections enter.
        keys: blocks above the entry, key/value heads and head width, `(L', K, H)`; where they are kept.
        keys_dtype: NumPy name of the dtype of keys and values.
    """

    identity: str
    taps: tuple[int, ...]
    hidden_size: int
    dtype: str
    kept: Kept = AT_TARGETS
    entry: Entry = "head"
    keys: tuple[int, int, int] = (0, 0, 0)
    keys_dtype: str = ""

    @classmethod
    def for_model(cls, identity: str, model: Llama, kept: Kept, keys_dtype: str) -> "FeatureSpec":
        """Describes the features that a backbone's program gives."""
        size = model.config
        spec = cls(identity, model.taps, size.hidden_size, np.dtype(model.activation_dtype).name, kept, model.entry)
        if not kept.keys:
            return spec
        above = blocks_above(model).num_layers
        return dataclasses.replace(spec, keys=(above, size.num_kv_heads, size.head_dim), keys_dtype=keys_dtype)

    @property
    def key(self) -> str:
        """Name of the directory that holds these features."""
        fields: dict[str, Any] = {"fingerprint": self.identity, "taps": self.taps, "hidden_size": self.hidden_size}
        fields |= {"dtype": self.dtype, "everywhere": self.kept.taps_everywhere}
        if self.entry != "head":
            fields |= {"entry": self.entry, "states": self.kept.states_everywhere, "keys": self.keys_dtype}
        return hashlib.sha256(json.dumps([FORMAT_VERSION, fields]).encode()).hexdigest()[:16]

    def shapes(self, tokens: int, targets: int) -> list[tuple[tuple[int, ...], np.dtype]]:
        """Returns shape and dtype of states, taps, base loss, and of keys and values where they are kept, for T tokens
        and R targets, in the order of a record."""
        dtype = np.dtype(self.dtype)
        shapes = [
            ((tokens if self.kept.states_everywhere else targets, self.hidden_size), dtype),
            ((len(self.taps), tokens if self.kept.taps_everywhere else targets, self.hidden_size), dtype),
            ((targets,), np.dtype(np.float32)),
        ]
        return shapes + ([((*self.keys, tokens), jnp.dtype(self.keys_dtype))] * 2 if self.kept.keys else [])

    def record(self, example: Example) -> list[tuple[tuple[int, ...], np.dtype]]:
        """Returns the `shapes` of an example."""
        return self.shapes(len(example.tokens), len(example.predict))

    def bytes(self, example: Example) -> int:
        """Returns the size of an example's record in bytes."""
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.record(example))


class TapCache:
    """Features of examples on disk, found by the examples' content."""

    def __init__(self, root: Path, spec: FeatureSpec) -> None:
        """Opens or creates the cache of these features under `root`; shards that cannot be read are removed, to be
        rebuilt.

        Raises:
            UserError: the directory cannot be written.
        """
        self.spec = spec
        self.directory = root / spec.key
        self._places: dict[str, tuple[Path, int]] = {}
        self._readers: dict[Path, ArrayRecordReader] = {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write the tap cache '{self.directory}': {error.strerror}") from error
        self.refresh()

    def refresh(self) -> None:
        """Opens the shards that other writers have added."""
        for shard in sorted(self.directory.glob("*.arrayrecord")):
            if shard not in self._readers:
                self._open(shard)

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        """Returns the examples whose features are not cached yet, each once, in the order given."""
        return list({e.digest: e for e in examples if e.digest not in self._places}.values())

    def needed_bytes(self, examples: Sequence[Example]) -> int:
        """Computes the size of what is not cached yet."""
        return sum(self.spec.bytes(example) for example in self.missing(examples))

    def has_room(self, need: int, limit_gib: float) -> bool:
        """Tells whether so many bytes are within the limit and fit on the disk."""
        return need <= limit_gib * 2**30 and need <= 0.95 * shutil.disk_usage(self.directory).free

    def check_room(self, examples: Sequence[Example], limit_gib: float) -> None:
        """Refuses a build that is larger than the limit or the disk.

        Raises:
            UserError: with the size, and what to change.
        """
        need, free = self.needed_bytes(examples), shutil.disk_usage(self.directory).free
        if not self.has_room(need, limit_gib):
            raise UserError(
                f"the tap cache would need {need / 2**30:.1f} GiB in '{self.directory}' (limit tap_cache.limit_gib="
                f"{limit_gib:g}, free on disk {free / 2**30:.1f} GiB): read fewer taps (side.taps), set "
                "tap_cache.directory to a larger disk, raise the limit, or set tap_cache.enabled=false "
                "to run the backbone every step"
            )

    def build(
        self, examples: Sequence[Example], run: Callable[[Sequence[Example]], Iterator[tuple[int, Features]]]
    ) -> None:
        """Computes and stores the features of examples not cached yet.

        Args:
            examples: any; those cached already cost nothing.
            run: runs the backbone over examples and yields (index, features of that one row) as they come.
        """
        todo = self.missing(examples)
        pending: list[tuple[str, bytes]] = []
        for index, features in run(todo):
            pending.append((todo[index].digest, self._pack(features, todo[index])))
            if len(pending) == SHARD_EXAMPLES:
                self._write(pending)
                pending = []
        if pending:
            self._write(pending)

    def read(self, example: Example) -> list[np.ndarray]:
        """Reads states, taps, base loss, and keys and values of one example, as `FeatureSpec.shapes` says.

        Raises:
            UserError: the shard is damaged.
        """
        shard, row = self._places[example.digest]
        try:
            (record,) = self._readers[shard].read([row])
        except RuntimeError as error:
            raise self._damaged(shard) from error
        arrays, offset = [], 0
        if len(record) != self.spec.bytes(example):
            raise self._damaged(shard)
        for shape, dtype in self.spec.record(example):
            count = int(np.prod(shape))
            arrays.append(np.frombuffer(record, dtype, count, offset).reshape(shape))
            offset += count * dtype.itemsize
        return arrays

    def collate(
        self, examples: Sequence[Example], rows: Int[np.ndarray, " B"], shape: tuple[int, int] | None = None
    ) -> Features:
        """Reads the batch of these rows, padded as by `pipeline.collate`; a row of -1 has no weight anywhere."""
        batch = collate(examples, rows, shape)
        shapes = self.spec.shapes(batch.tokens.shape[1], batch.predict.shape[1])
        padded = [np.zeros((len(rows), *shape), dtype) for shape, dtype in shapes]
        for i, row in enumerate(rows):
            if row >= 0:
                for whole, part in zip(padded, self.read(examples[row]), strict=True):
                    whole[i][tuple(map(slice, part.shape))] = part
        states, taps, base_loss, *keys = (cast(Any, array) for array in padded)
        features = with_positions(batch, self.spec.kept, self.spec.entry, states, taps, base_loss)
        return features._replace(keys=dict(zip(("k", "v"), keys))) if keys else features

    def _pack(self, features: Features, example: Example) -> bytes:
        keys = [] if features.keys is None else [features.keys["k"], features.keys["v"]]
        arrays, shapes = [features.states, features.taps, features.base_loss, *keys], self.spec.record(example)
        return b"".join(
            np.asarray(a)[tuple(map(slice, shape))].astype(dtype).tobytes()
            for a, (shape, dtype) in zip(arrays, shapes, strict=True)
        )

    def _write(self, records: Sequence[tuple[str, bytes]]) -> None:
        digests = [digest for digest, _ in records]
        try:
            with tempfile.TemporaryDirectory(dir=self.directory, prefix=".shard.") as temporary:
                new = Path(temporary) / "shard"
                writer = ArrayRecordWriter(str(new), "group_size:1,uncompressed")
                writer.write(json.dumps(digests).encode())
                for _, record in records:
                    writer.write(record)
                writer.close()
                shard = self.directory / f"{hashlib.sha256(''.join(digests).encode()).hexdigest()[:32]}.arrayrecord"
                new.replace(shard)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write the tap cache '{self.directory}': {error}") from error
        self._open(shard)

    def _open(self, shard: Path) -> None:
        if not shard.is_file():
            return
        reader = ArrayRecordReader(str(shard), "readahead_buffer_size:0")
        try:
            digests = json.loads(reader.read([0])[0]) if reader.num_records() else []
        except (RuntimeError, ValueError):
            digests = []
        if not digests or reader.num_records() != len(digests) + 1:
            shard.unlink(missing_ok=True)
            return
        self._readers[shard] = reader
        self._places.update({digest: (shard, row) for row, digest in enumerate(digests, start=1)})

    def _damaged(self, shard: Path) -> UserError:
        return UserError(f"the tap cache shard '{shard}' is damaged: delete it and run again, it will be rebuilt")
