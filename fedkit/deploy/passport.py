"""The passport of a bundle: where its model comes from, what it can do, and what it has cost in privacy.

Clients are named by pseudonyms that only whoever exports can work out. Scores are those that were released: a client's
own only where its site shows them.
"""

from __future__ import annotations

import json
from dataclasses import field
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from fedkit.config import Engine, Name, Settings, parse
from fedkit.errors import PayloadError
from fedkit.exam import Variant

__all__ = [
    "Calibrated",
    "ClientFacts",
    "Examined",
    "FileFacts",
    "Measured",
    "ModelFacts",
    "Parity",
    "Passport",
    "PrivacyFacts",
    "RunFacts",
    "Scores",
    "TaskFacts",
    "TensorFacts",
]

Scores: TypeAlias = dict[str, float | None]  # by metric, "loss" among them; None where one is undefined
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

_CHARACTERS = 64 << 20


class RunFacts(Settings):
    """Which run. `engine` says whether clients were simulated; `best`: the model is the best round's, not the last.

    `held_out`: validation rows were set aside in training; else they may be among those that were trained on.
    """

    name: Name
    seed: int
    engine: Engine
    rounds: int
    round: int
    best: bool = False
    held_out: bool = False
    strategy: str
    settings: dict[str, Any] = field(default_factory=dict)


class TensorFacts(Settings):
    """One input or output; a dimension of None may vary, the first is the batch."""

    name: str
    dtype: str
    shape: list[int | None]


class TaskFacts(Settings):
    """What was learned, by which code: `source` is the BLAKE3 digest of the task's files, None where there are none."""

    name: str
    source: Sha256 | None
    inputs: list[TensorFacts]
    outputs: list[TensorFacts]
    metrics: list[str]


class ModelFacts(Settings):
    """Which weights: their digest, as the run's history names it, and how many parameters there are."""

    weights: Sha256
    parameters: int


class ClientFacts(Settings):
    """One client by its pseudonym: in how many rounds it contributed, its own test scores and epsilon where known."""

    pseudonym: str
    rounds: int
    test: Scores | None = None
    epsilon: float | None = None


class PrivacyFacts(Settings):
    """What protected the clients' data, as `fedkit.Privacy` says it; `dp` is None where nothing was noised."""

    aggregation: str
    sealed: bool = False
    dp: dict[str, Any] | None = None


class Calibrated(Settings):
    """Where the ranges of int8 come from: `method`, how many clients were asked, rows at each at most, and the cost.

    `method` "mean": the mean over clients of their ranges; "clipped": the range that holds all but a thousandth of
    rows' extremes; "rows": one and a half times the noised mean of rows' extremes, over all rows; "noise": standard
    normal inputs, no data. `rows` is None for all of them. `epsilon` and `delta` where the answer was noised: it has
    cost that whether or not int8 was shipped.
    """

    method: Literal["mean", "clipped", "rows", "noise"]
    clients: int
    rows: int | None
    epsilon: float | None = None
    delta: float | None = None


class Parity(Settings):
    """The largest difference between ONNX Runtime and PyTorch, relative to the largest output, and the one allowed."""

    difference: float
    allowed: float
    batches: list[int]


class Measured(Settings):
    """One variant at the gate. `passed` says whether it could be shipped, `why` in words what decided.

    `operators` counts those whose weights are kept in fewer bits. `size_ratio`, and `cpu_ratio` by batch size, are over
    fp32 in ONNX Runtime, `torch_ratio` over PyTorch eager; CPU seconds are of one call. `agreement` is the share of
    validation rows on which it answers as PyTorch does; `valid` are its scores on the clients' validation rows, and
    `drop` by how much the deciding metric is worse than that of fp32.
    """

    variant: Variant
    passed: bool
    why: str
    operators: int = 0
    size_bytes: int = 0
    size_ratio: float = 1.0
    cpu_s: dict[str, float] = field(default_factory=dict)
    cpu_ratio: dict[str, float] = field(default_factory=dict)
    torch_ratio: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None
    valid: Scores | None = None
    drop: float | None = None


class Examined(Settings):
    """The shipped file's examination on the clients' test rows, in ONNX Runtime at the clients, added up as sums.

    `sites` answered; `passing` counts, by criterion such as "accuracy>=0.7", how many of them meet it on their own
    rows. `groups` has scores by group of rows; `noise` has scores with normal noise added to the inputs, by its
    standard deviation in units of the inputs' own. `latency_s` is the time of one call by batch size, as exported.
    """

    variant: Variant
    sites: int
    pooled: Scores
    passing: dict[str, int] = field(default_factory=dict)
    groups: dict[str, Scores] = field(default_factory=dict)
    noise: dict[str, Scores] = field(default_factory=dict)
    latency_s: dict[str, float] = field(default_factory=dict)


class FileFacts(Settings):
    """One file of the bundle."""

    sha256: Sha256
    size_bytes: int


class Passport(Settings):
    """Everything that a bundle says of itself; signed as a whole. `shipped` is the variant that the gate chose."""

    format: Literal[1] = 1
    created: str
    run: RunFacts
    task: TaskFacts
    model: ModelFacts
    clients: list[ClientFacts]
    test: Scores
    privacy: PrivacyFacts
    calibration: Calibrated | None = None
    parity: Parity
    gate: list[Measured]
    shipped: Variant
    examined: Examined | None = None
    versions: dict[str, str]
    files: dict[Name, FileFacts] = field(default_factory=dict)

    def to_json(self) -> str:
        """The passport as it is signed: sorted keys, two spaces of indent, a newline at the end."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Passport:
        """What `to_json` wrote; raises `PayloadError` for text that is no JSON, `ConfigError` for other fields."""
        if len(text) > _CHARACTERS:
            raise PayloadError(f"a passport has at most {_CHARACTERS} characters, got {len(text)}")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PayloadError(f"the passport is not JSON: {type(error).__name__}") from None
        if not isinstance(values, dict):
            raise PayloadError("the passport is not a JSON object")
        return parse(cls, values, where="passport")

    def measured(self, variant: Variant) -> Measured | None:
        """What the gate measured of a variant; None where it was not tried."""
        return next((one for one in self.gate if one.variant == variant), None)
