"""Batches: which rows, in which order, on which device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from blake3 import blake3
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from fedkit import rng
from fedkit.errors import DataError
from fedkit.task import Data
from fedkit.work import BatchSize

__all__ = [
    "VALID_SHARE",
    "all_rows",
    "batches",
    "fingerprint",
    "row_count",
    "shuffled",
    "smallest_class",
    "split_valid",
    "subset",
    "to_device",
]

VALID_SHARE = 0.1
_FINGERPRINTED = 1000


def row_count(rows: Dataset[Any]) -> int:
    """The number of rows; raises `DataError` for a data set without a length."""
    try:
        return len(rows)  # type: ignore[arg-type]
    except TypeError:
        raise DataError("a data set needs __len__: privacy and weighting count its rows") from None


def smallest_class(targets: Iterable[torch.Tensor]) -> int:
    """How many rows the rarest class has, over the columns of all batches; 0 where there is only one class.

    Where targets are not whole numbers, they are no classes, and all rows count.
    """
    whole = torch.cat([batch.reshape(len(batch), -1) for batch in targets])
    if whole.is_floating_point() and not bool((whole == whole.round()).all()):
        return len(whole)
    counts = [torch.unique(column, return_counts=True)[1] for column in whole.T]
    return min((int(count.min()) if len(count) > 1 else 0 for count in counts), default=0)


def fingerprint(rows: Dataset[Any]) -> str:
    """A digest (hex) of the number of rows and the bytes of up to a thousand of them, evenly spaced."""
    count = row_count(rows)
    total = blake3(str(count).encode())
    for i in range(0, count, max(-(-count // _FINGERPRINTED), 1)):
        for value in _values(rows[i]):
            total.update(value)
    return total.hexdigest()


def _values(row: Any) -> Iterator[bytes]:
    """The bytes of the numbers in a row; of anything else, only that it is there."""
    if isinstance(row, Mapping):
        row = tuple(row.values())
    if isinstance(row, tuple | list):
        for part in row:
            yield from _values(part)
    elif isinstance(row, torch.Tensor):
        yield row.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if row.numel() else b"-"
    else:
        yield str(row).encode() if isinstance(row, int | float | str) else type(row).__name__.encode()


def split_valid(data: Data, seed: int, client: str) -> tuple[Dataset[Any], Dataset[Any]]:
    """(train, valid): as given, or with a seeded tenth of train (at least one row) set aside."""
    if data.valid is not None:
        return data.train, data.valid
    count = row_count(data.train)
    if count < 2:
        raise DataError(f"{client}: {count} training rows cannot be split; give Data(valid=...)")
    order = torch.randperm(count, generator=rng.torch_generator(seed, "valid", client))
    held = max(int(count * VALID_SHARE), 1)
    return subset(data.train, order[held:].sort().values), subset(data.train, order[:held].sort().values)


def subset(rows: Dataset[Any], index: torch.Tensor) -> Dataset[Any]:
    """The rows of these numbers [count], in this order."""
    if isinstance(rows, TensorDataset):
        return TensorDataset(*(column[index] for column in rows.tensors))
    return Subset(rows, index.tolist())


def shuffled(
    count: int, size: BatchSize, *, epochs: int | None, steps: int | None, seed: int
) -> Iterator[torch.Tensor]:
    """Row numbers batch by batch: each pass is a fresh permutation, its last batch may be short.

    Stops after `epochs` passes or `steps` batches; "all" gives every row in order.
    """
    generator = torch.Generator().manual_seed(rng.seed_for(seed, "batches"))
    done, passes = 0, 0
    while (passes < epochs) if steps is None else (done < steps):  # type: ignore[operator]
        order = torch.arange(count) if size == "all" else torch.randperm(count, generator=generator)
        for index in torch.split(order, count if size == "all" else size):
            if steps is not None and done == steps:
                return
            yield index
            done += 1
        passes += 1


def batches(data: Data, rows: Dataset[Any], index: Iterator[torch.Tensor], device: torch.device) -> Iterator[Any]:
    """The batches of these row numbers on `device`; tensors are indexed, other data sets read row by row."""
    if isinstance(rows, TensorDataset) and data.collate is None:
        columns = [column.to(device) for column in rows.tensors]
        for chosen in index:
            where = chosen.to(device)
            yield tuple(column[where] for column in columns)
        return
    chosen_rows = (chosen.tolist() for chosen in index)
    loader: DataLoader[Any] = DataLoader(rows, batch_sampler=chosen_rows, collate_fn=data.collate)
    for batch in loader:
        yield to_device(batch, device)


def all_rows(data: Data, rows: Dataset[Any], size: int, device: torch.device) -> Iterator[tuple[Any, int]]:
    """(batch, number of rows) over all rows in order."""
    index = list(torch.split(torch.arange(row_count(rows)), size))
    for batch, chosen in zip(batches(data, rows, iter(index), device), index, strict=True):
        yield batch, len(chosen)


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors inside tuples, lists and dicts moved to `device`; anything else as it is."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
