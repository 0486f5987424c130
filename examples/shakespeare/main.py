"""Next-character prediction on Shakespeare, one client a role: batches that are dicts, a GRU, `step` and `predict`."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

import fedkit
from fedkit.errors import DataError
from fedkit.strategies import FedAvg

# The alphabet is public knowledge, fixed before training: none of it is learned from anybody's text.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
UNKNOWN = len(ALPHABET)
LENGTH = 40
TRAIN_SHARE = 0.8
PASSAGES = Path(__file__).with_name("passages.json")

Batch: TypeAlias = dict[str, torch.Tensor]  # and so is a row: a batch has the rows' tensors stacked


# -- the texts ---------------------------------------------------------------------------------------------------------


def read_roles(folder: Path | None) -> dict[str, str]:
    """{role: text} from the folder's roles.json.gz, or the passages that come with this example; raises `DataError`."""
    if folder is None:
        path, content = PASSAGES, PASSAGES.read_bytes()
    else:
        inner = folder / "shakespeare_roles"
        path = (inner if inner.is_dir() else folder) / "roles.json.gz"
        content = _unpacked(path)
    try:
        roles = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(roles, dict) or not all(isinstance(text, str) for text in roles.values()):
        raise DataError(f'{path}: expected one object of texts, such as {{"ROMEO": "But soft, ..."}}')
    return long_enough(roles, path)


def _unpacked(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            return file.read()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file: give --data the folder that holds roles.json.gz") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked ({error})") from None


def long_enough(roles: Mapping[str, str], path: Path) -> dict[str, str]:
    """The roles whose text fills a sequence on both sides of the split; raises `DataError` where there is none."""
    least = int((LENGTH + 1) / (1 - TRAIN_SHARE)) + 1
    kept = {role: text for role, text in roles.items() if len(text) >= least}
    if not kept:
        raise DataError(f"{path}: no role has {least} characters, the least for a training and a test sequence")
    return kept


def sequences(text: str) -> list[Batch]:
    """Non-overlapping sequences of a text, each with the characters that follow."""
    codes = torch.tensor([code if (code := ALPHABET.find(letter)) >= 0 else UNKNOWN for letter in text])
    starts = range(0, len(codes) - LENGTH, LENGTH)
    return [{"text": codes[at : at + LENGTH], "next": codes[at + 1 : at + 1 + LENGTH]} for at in starts]


# -- the task ----------------------------------------------------------------------------------------------------------


class NextCharacter(nn.Module):
    """Scores of every character at every place, from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET) + 1, 32)
        self.gru = nn.GRU(32, 64, batch_first=True)
        self.scores = nn.Linear(64, len(ALPHABET) + 1)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """(batch, length) codes to (batch, length, characters) scores."""
        return self.scores(self.gru(self.embedding(text))[0])


def step(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The mean loss of a batch."""
    return functional.cross_entropy(model(batch["text"]).flatten(0, 1), batch["next"].flatten())


def predict(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, targets), as the metrics take them."""
    return model(batch["text"]).flatten(0, 1), batch["next"].flatten()


def task(roles: Mapping[str, str]) -> fedkit.Task:
    """The first part of each role trains, the rest tests."""

    def load(role: str) -> fedkit.Data:
        cut = int(len(roles[role]) * TRAIN_SHARE)
        return fedkit.Data(train=sequences(roles[role][:cut]), test=sequences(roles[role][cut:]))

    return fedkit.Task(
        name="shakespeare",
        model=NextCharacter,
        data=load,
        step=step,
        predict=predict,
        optimizer=torch.optim.Adam,
        metrics={"accuracy": lambda: MulticlassAccuracy(len(ALPHABET) + 1, average="micro")},
        inputs={"text": fedkit.Tensor("int64", (LENGTH,))},
        outputs=["scores"],
    )


def commonest(roles: Mapping[str, str]) -> float:
    """The accuracy of always saying the commonest character, on the test part of the roles."""
    text = "".join(text[int(len(text) * TRAIN_SHARE) :] for text in roles.values())
    return max(map(text.count, set(text))) / len(text)


def continued(model: nn.Module, text: str, count: int) -> str:
    """`text` and the `count` characters that the model finds most likely to follow."""
    codes = [max(ALPHABET.find(letter), 0) for letter in text]
    with torch.inference_mode():
        for _ in range(count):
            codes.append(int(model(torch.tensor([codes]))[0, -1, :UNKNOWN].argmax()))
    return "".join(ALPHABET[code] for code in codes)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    folder = os.environ.get("FEDKIT_DATA")
    parser.add_argument("--data", type=Path, default=folder, help="folder with roles.json.gz; else four short passages")
    parser.add_argument("--roles", type=int, default=6, help="how many roles take part, those with most text first")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps a role and round")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Prints the test accuracy of each role and of all together, and a line that the model wrote."""
    arguments = parse()
    try:
        roles = read_roles(arguments.data)
        chosen = sorted(sorted(roles, key=lambda role: -len(roles[role]))[: arguments.roles])
        local = fedkit.Fit(steps=arguments.steps, batch_size=32, lr=0.02)
        strategy = FedAvg(rounds=arguments.rounds, local=local)
        result = fedkit.simulate(task(roles), strategy, clients=chosen, seed=arguments.seed)
    except fedkit.FedkitError as error:
        raise SystemExit(f"error: {error}") from None
    for role, scores in result.test_per_client.items():
        print(f"{role:20} {len(roles[role]):6} characters, test accuracy {scores['accuracy']:.3f}")
    print(f"{len(chosen)} roles together: test accuracy {result.test['accuracy']:.3f}")
    print(f"always the commonest character: {commonest({role: roles[role] for role in chosen}):.3f}")
    print(f"the model writes: {continued(result.model, 'My lord', 40)!r}")


if __name__ == "__main__":
    main()
