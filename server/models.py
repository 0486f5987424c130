"""The models that runs refer to by digest: small ones in the database, which saves flushes, the others as files."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from fedkit.errors import PayloadError, StorageError
from fedkit.packing import pack, unpack
from fedkit.server.blobs import Blobs, StoredModel
from fedkit.server.database import Database
from fedkit.weights import Weights

__all__ = ["INLINE_BYTES", "Models"]

INLINE_BYTES = 1 << 16


class Models:
    """Keeps what is referred to, and nothing else. Models of at most `inline_bytes` lie in the database."""

    def __init__(self, database: Database, blobs: Blobs, inline_bytes: int = INLINE_BYTES) -> None:
        self._database = database
        self._blobs = blobs
        self._inline_bytes = inline_bytes

    def is_small(self, weights: Weights) -> bool:
        """Whether the model belongs into the database."""
        return 4 * weights.manifest.size <= self._inline_bytes

    def put(self, models: Iterable[Weights]) -> list[Weights]:
        """Makes the large ones durable and returns the small ones, which are for `insert`."""
        different = {weights.digest: weights for weights in models}.values()
        for weights in different:
            if not self.is_small(weights):
                self._blobs.put(weights)
        return [weights for weights in different if self.is_small(weights)]

    def insert(self, connection: sqlite3.Connection, small: Iterable[Weights]) -> None:
        """Stores small models as a part of a transaction that refers to them."""
        rows = [(weights.digest, weights) for weights in small]
        for digest, weights in rows:
            if connection.execute("SELECT 1 FROM models WHERE digest = ?", (digest,)).fetchone() is None:
                connection.execute("INSERT INTO models (digest, content) VALUES (?, ?)", (digest, pack(weights)))

    def get(self, digest: str) -> Weights:
        """The model of that digest; raises `StorageError` or `PayloadError` where it is not what was stored."""
        small = self._small(digest)
        return self._blobs.get(digest) if small is None else small

    def later(self, digest: str) -> Weights:
        """The same, but a large model is read when it is first used."""
        small = self._small(digest)
        return StoredModel(self._blobs, digest) if small is None else small

    def set_aside(self, weights: Weights) -> Weights:
        """A stored model without its values, which are read again when they are used; a small one stays as it is."""
        if isinstance(weights, StoredModel) or self.is_small(weights):
            return weights
        return StoredModel(self._blobs, weights.digest)

    def _small(self, digest: str) -> Weights | None:
        row = self._database.row("SELECT content FROM models WHERE digest = ?", (digest,))
        if row is None:
            return None
        try:
            weights = unpack(row[0])
        except PayloadError as error:
            raise StorageError(f"{self._database.path}: model {digest} is damaged: {error}") from error
        if not isinstance(weights, Weights) or weights.digest != digest:
            raise StorageError(f"{self._database.path}: model {digest} is damaged: put back a copy of the folder")
        return weights

    def sweep_rows(self, connection: sqlite3.Connection) -> None:
        """Removes small models that nothing refers to any more, as a part of a transaction."""
        connection.execute("DELETE FROM models WHERE digest NOT IN (SELECT digest FROM referenced)")

    def sweep_files(self) -> None:
        """Removes blobs that nothing refers to any more."""
        with self._blobs.lock:
            self._blobs.keep_only([digest for (digest,) in self._database.rows("SELECT digest FROM referenced")])
