"""Does one client's work on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from fedkit import rng
from fedkit.errors import ConfigError, DataError, Reason, Refused
from fedkit.gate import BEFORE, VERDICT, Gate
from fedkit.metrics import MetricSet
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.task import Data, Task
from fedkit.trainer.batches import all_rows, batches, row_count, shuffled, smallest_class, split_valid
from fedkit.trainer.loop import Loop
from fedkit.weights import Binding, Vector, Weights
from fedkit.work import Answer, Evaluate, Fit, Gradient, MetricSums, Summarize, Summary, Update

__all__ = ["ClientState", "LocalSite", "Trainer", "Watch", "pick_device"]

T = TypeVar("T")

Watch: TypeAlias = Callable[[int, int], None]  # (batches begun, of how many; 0: unknown)
ClientState: TypeAlias = dict[str, npt.NDArray[Any]]

_LOCAL = "local/"  # tensors of the model that are not exchanged
_CONTROL = "control"  # SCAFFOLD's c and c_i


def pick_device(wish: str = "auto") -> torch.device:
    """The device named, or for "auto" cuda, then mps, then cpu; raises `ConfigError` for one that is not there."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wish == "auto":
        return torch.device(next(name for name, there in found.items() if there))
    kind = wish.partition(":")[0]
    if not found.get(kind):
        there = ", ".join(name for name, yes in found.items() if yes)
        raise ConfigError(f"device {wish!r} is not to be had here; there is {there}")
    try:
        return torch.device(wish)
    except RuntimeError as error:
        raise ConfigError(f"device {wish!r}: {error}") from None


@dataclass
class LocalSite:
    """What a task's own `train` loop sees of its client; see `fedkit.task.Site`."""

    client: str
    fit: Fit
    device: torch.device
    state: MutableMapping[str, npt.NDArray[Any]]
    received: Mapping[str, Vector]
    sent: dict[str, Vector] = field(default_factory=dict)

    def send(self, name: str, vector: npt.ArrayLike) -> None:
        """Hands a named float32 vector back along with the update."""
        self.sent[name] = np.ascontiguousarray(vector, dtype=np.float32).reshape(-1).copy()


class Trainer:
    """One module on one device that does the work of any number of clients, one after the other.

    `seed` is the run's; `holds_out_valid` sets a tenth of the training rows aside where a client has no validation
    data. `cached_clients` data sets are kept loaded. `watch` learns of each batch before it is used, and ends the
    work by raising.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        *,
        device: str = "auto",
        holds_out_valid: bool = False,
        cached_clients: int = 64,
        watch: Watch | None = None,
    ) -> None:
        self.task = task
        self.device = pick_device(device)
        self._watch = watch
        self._seed = seed
        self._holds_out_valid = holds_out_valid
        self._module = task.build(seed).to(self.device)
        self._parts = list(self._module.modules())
        self._binding = Binding(self._module, task.travels)
        self._fresh = {name: tensor.detach().clone() for name, tensor in self._binding.local.items()}
        saved = {id(tensor) for tensor in self._module.state_dict(keep_vars=True).values()}
        passing = [buffer for buffer in self._module.buffers() if id(buffer) not in saved]
        self._passing = [(buffer, buffer.detach().clone()) for buffer in passing]
        self.load = lru_cache(maxsize=cached_clients)(self._load)

    def _load(self, client: str) -> tuple[Data, Dataset[Any], Dataset[Any] | None]:
        rng.seed_all(rng.seed_for(self._seed, "data", client))
        data = self.task.data(client)
        if not isinstance(data, Data):
            raise DataError(f"{client}: data() must return fedkit.Data, got {type(data).__name__}")
        if row_count(data.train) == 0:
            raise Refused(Reason.NO_DATA, f"{client} has no training rows")
        if self._holds_out_valid:
            return data, *split_valid(data, self._seed, client)
        return data, data.train, data.valid

    def perform(self, assignment: Assignment, parcel: Parcel, state: ClientState) -> tuple[Answer, ClientState]:
        """The answer and the client's next state; raises `Refused` where there is no data for the work."""
        work = assignment.work
        if isinstance(work, Summarize):
            return self._summarize(assignment.client, work), state
        if isinstance(work, Fit) and work.gate is not None:
            return self._fit_gated(assignment, work.gate, parcel, state)
        return self._work(assignment, parcel, state)

    def _work(self, assignment: Assignment, parcel: Parcel, state: ClientState) -> tuple[Answer, ClientState]:
        work = assignment.work
        self._receive(parcel.model, state)
        seed = rng.seed_for(assignment.seed, assignment.round, assignment.client)
        self.load(assignment.client)  # before the seed is set, so that nothing depends on what is cached
        rng.seed_all(seed)
        if isinstance(work, Evaluate):
            return self._evaluate(assignment.client, work), state
        if isinstance(work, Gradient):
            return self._gradient(assignment, work, seed), state
        assert isinstance(work, Fit)  # there is no other
        own = {name: array.copy() for name, array in state.items()}  # a train loop may change arrays in place
        return self._fit(assignment, work, parcel, own, seed)

    def _receive(self, model: Weights, state: ClientState) -> None:
        """The module holds `model` and the client's own tensors, in training mode."""
        self._binding.write(model)
        with torch.no_grad():
            for name, tensor in self._binding.local.items():
                kept = state.get(_LOCAL + name)
                tensor.copy_(self._fresh[name] if kept is None else torch.from_numpy(kept))
            for buffer, fresh in self._passing:
                buffer.copy_(fresh)
        self._module.zero_grad(set_to_none=True)
        if not all(part.training for part in self._parts):
            self._module.train()

    def _fit(
        self, at: Assignment, fit: Fit, parcel: Parcel, state: ClientState, seed: int
    ) -> tuple[Update, ClientState]:
        data, rows, _ = self.load(at.client)
        count = row_count(rows)
        index = shuffled(count, fit.batch_size, epochs=fit.epochs, steps=fit.steps, seed=seed)
        received = {name: vector.copy() for name, vector in parcel.extra.items()}
        site = LocalSite(at.client, fit, self.device, state, received)
        stream = self._watched(batches(data, rows, index, self.device), _steps(fit, count))
        loss = self._train(stream, site, parcel)
        state |= {_LOCAL + name: _array(tensor) for name, tensor in self._binding.read_local().items()}
        result = self._binding.read() if at.returns == "weights" else self._binding.read_change(parcel.model)
        return Update(result, count, loss, site.sent), state

    def _fit_gated(self, at: Assignment, gate: Gate, parcel: Parcel, state: ClientState) -> tuple[Update, ClientState]:
        """Trains from the received model if the hop that made it keeps to the gate, else from the model before."""
        extra = dict(parcel.extra)
        if BEFORE not in extra:
            raise Refused(Reason.PAYLOAD, "a gate needs the model before, which did not come along")
        before = parcel.model.with_vector(extra.pop(BEFORE))
        verdict = gate.judge(parcel.model, before, lambda model: self._score(at.client, model, state, gate.scored))
        start = Parcel(parcel.model if verdict.broken is None else before, extra)
        update, after = self._work(at, start, state)
        assert isinstance(update, Update)  # what a Fit is answered with
        return replace(update, extra={**update.extra, VERDICT: verdict.to_vector()}), after

    def _score(self, client: str, model: Weights, state: ClientState, metric: str) -> float:
        """A model's metric on the client's own validation rows."""
        self._receive(model, state)
        sums = self._evaluate(client, Evaluate())
        return MetricSet(self.task).compute(sums.vector)[metric]

    def _watched(self, stream: Iterator[T], total: int = 0) -> Iterator[T]:
        return stream if self._watch is None else _watched(stream, self._watch, total)

    def _train(self, stream: Iterator[Any], site: LocalSite, parcel: Parcel) -> float | None:
        if self.task.train is not None:
            loss = self.task.train(self._module, stream, site)
            return None if loss is None else float(loss)
        loop = Loop(self.task, self._module, self._binding, site.fit, self.device)
        loop.pull_to(parcel.model.vector)
        if site.fit.control_variates:
            self._train_controlled(loop, stream, site, parcel)
        else:
            loop.run(stream)
        return loop.mean_loss()

    def _train_controlled(self, loop: Loop, stream: Iterator[Any], site: LocalSite, parcel: Parcel) -> None:
        zeros = np.zeros_like(parcel.model.vector)
        server, mine = site.received.get(_CONTROL, zeros), site.state.get(_CONTROL, zeros)
        loop.correct_by(server - mine)
        loop.run(stream)
        following = loop.control(parcel.model.vector, self._binding.read().vector, mine, server)
        site.send(_CONTROL, following - mine)
        site.state[_CONTROL] = following

    def _gradient(self, at: Assignment, work: Gradient, seed: int) -> Update:
        data, rows, _ = self.load(at.client)
        count = row_count(rows)
        index = shuffled(count, work.batch_size, epochs=None, steps=1, seed=seed)
        self._module.zero_grad(set_to_none=True)
        loss = self.task.mean_loss(self._module, next(batches(data, rows, index, self.device)))
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = self._binding.read_gradients()
        self._module.zero_grad(set_to_none=True)
        return Update(gradient, count, float(loss.detach()))

    def rows(self, client: str) -> int:
        """How many rows there are to train on."""
        return row_count(self.load(client)[1])

    def smallest_class(self, client: str, work: Evaluate) -> int:
        """How many of the rows that are scored the rarest class has; all, where rows are not (features, targets)."""
        data, rows = self._scored(client, work)
        if self.task.step is not None:
            return row_count(rows)
        batches = all_rows(data, rows, work.batch_size, torch.device("cpu"))
        return smallest_class(self.task.columns(batch)[1] for batch, _ in batches)

    def _scored(self, client: str, work: Evaluate) -> tuple[Data, Dataset[Any]]:
        data, _, valid = self.load(client)
        rows = valid if work.split == "valid" else data.test
        if rows is None or row_count(rows) == 0:
            raise Refused(Reason.NO_DATA, f"{client} has no {work.split} rows")
        return data, rows

    def _evaluate(self, client: str, work: Evaluate) -> MetricSums:
        data, rows = self._scored(client, work)
        if not self.task.scores():
            raise Refused(Reason.NO_DATA, f"{self.task.name} has neither loss nor step to score with")
        self._module.eval()
        metrics = MetricSet(self.task, self.device)
        with torch.inference_mode():
            for batch, count in self._watched(all_rows(data, rows, work.batch_size, self.device)):
                metrics.update(self._module, batch, count)
        return MetricSums(metrics.sums(), row_count(rows))

    def _summarize(self, client: str, work: Summarize) -> Summary:
        data, rows, _ = self.load(client)
        columns = (self.task.columns(batch) for batch, _ in all_rows(data, rows, 4096, torch.device("cpu")))
        flat = ((x.reshape(len(x), -1).numpy(), y.numpy()) for x, y in columns)
        return Summary(work.query.answer(flat), row_count(rows))


def _steps(fit: Fit, count: int) -> int:
    size = count if fit.batch_size == "all" else fit.batch_size
    return fit.steps or (fit.epochs or 1) * -(-count // size)


def _watched(stream: Iterator[T], watch: Watch, total: int) -> Iterator[T]:
    for done, batch in enumerate(stream):
        watch(done, total)
        yield batch


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    plain = tensor.detach().cpu()
    return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy().copy()
