"""Does one client's work on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from fedkit import rng
from fedkit.errors import ConfigError, DataError, Reason, Refused
from fedkit.gate import BEFORE, VERDICT, Gate
from fedkit.metrics import MetricSet
from fedkit.privacy.clipping import ClippedGradients
from fedkit.privacy.dpsgd import Done, NoisyGradients, PrivateSteps
from fedkit.privacy.models import require_private
from fedkit.privacy.randomness import Randomness
from fedkit.queries import Moments
from fedkit.ranges import RANGES, Ranges, noised
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.task import Data, Task
from fedkit.trainer.batches import all_rows, batches, fingerprint, row_count, shuffled, smallest_class, split_valid
from fedkit.trainer.deployed import Exporter
from fedkit.trainer.loop import Loop
from fedkit.trainer.quantized import as_asked
from fedkit.weights import Binding, Vector, Weights
from fedkit.work import Answer, Evaluate, Fit, Gradient, MetricSums, Steps, Summarize, Summary, Update

__all__ = ["ClientState", "LocalSite", "Trainer", "Watch", "pick_device"]

T = TypeVar("T")

Watch: TypeAlias = Callable[[int, int], None]  # (batches begun, of how many; 0: unknown)
ClientState: TypeAlias = dict[str, npt.NDArray[Any]]

_LOCAL = "local/"  # tensors of the model that are not exchanged
_CONTROL = "control"  # SCAFFOLD's c and c_i
_CPU = torch.device("cpu")


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
    round: int
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
    work by raising. `done` says what came of the last private work, for the site alone.
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
        self._module = task.build(seed).to(self.device)
        self._parts = list(self._module.modules())
        self._binding = Binding(self._module, task.travels)
        self._fresh = {name: tensor.detach().clone() for name, tensor in self._binding.local.items()}
        saved = {id(tensor) for tensor in self._module.state_dict(keep_vars=True).values()}
        passing = [buffer for buffer in self._module.buffers() if id(buffer) not in saved]
        self._passing = [(buffer, buffer.detach().clone()) for buffer in passing]
        # None of these refers to the trainer: data of clients must go with it at once, not when cycles are looked for.
        self.load = load = lru_cache(maxsize=cached_clients)(partial(_loaded, task, seed, holds_out_valid))
        self.fingerprint = lru_cache(maxsize=cached_clients)(lambda client: fingerprint(load(client)[1]))
        self._watched = partial(_watched, watch)
        self.done = Done()
        self._clipped: ClippedGradients | None = None
        self._exporter = Exporter(task, seed, self._watched)

    def perform(
        self,
        assignment: Assignment,
        parcel: Parcel,
        state: ClientState,
        private: PrivateSteps | None = None,
        *,
        question: Steps | None = None,
    ) -> tuple[Answer, ClientState]:
        """The answer and the client's next state; raises `Refused` where there is no data for the work.

        With `private`, a `Fit` or `Gradient` is done by `NoisyGradients` and tells no loss. Raises `Refused` where the
        plan is not what the work means on this data, `IncompatibleStrategy` where it cannot be done privately. With
        `question`, the answer to a `Summarize` is noised as that step says. An update that is to be clipped is.
        """
        work = assignment.work
        if private is not None:
            return self._privately(assignment, parcel, state, private)
        if isinstance(work, Summarize) and isinstance(work.query, Ranges):
            self._receive(parcel.model, state)
            data, rows, _ = self.load(assignment.client)
            return self._noised(
                work, self._exporter.ranges(self._module, work.query, assignment.client, data, rows), question
            ), state
        if isinstance(work, Summarize):
            return self._noised(work, self._summarize(assignment.client, work), question), state
        if isinstance(work, Fit) and work.gate is not None:
            return self._fit_gated(assignment, work.gate, parcel, state)
        answer, after = self._work(assignment, parcel, state)
        if assignment.clip is not None and isinstance(answer, Update):
            return assignment.clip.cut(answer), after
        return answer, after

    def _work(self, assignment: Assignment, parcel: Parcel, state: ClientState) -> tuple[Answer, ClientState]:
        work = assignment.work
        self._receive(parcel.model, state)
        seed = rng.seed_for(assignment.seed, assignment.round, assignment.client)
        self.load(assignment.client)  # before the seed is set, so that nothing depends on what is cached
        rng.seed_all(seed)
        if isinstance(work, Evaluate):
            if work.exam is not None:
                about = (work, work.exam, parcel.extra.get(RANGES), *self._scored(assignment.client, work))
                return self._exporter.examine(self._module, *about), state
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
        stream = self._watched(batches(data, rows, index, self.device), fit.steps_on(count))
        return self._fitted(at, fit, parcel, state, stream)

    def _fitted(
        self,
        at: Assignment,
        fit: Fit,
        parcel: Parcel,
        state: ClientState,
        stream: Iterator[Any],
        noisy: NoisyGradients | None = None,
    ) -> tuple[Update, ClientState]:
        received = {name: vector.copy() for name, vector in parcel.extra.items()}
        site = LocalSite(at.client, at.round, fit, self.device, state, received)
        with as_asked(fit, at.round, self._module):
            loss = self._train(stream, site, parcel, noisy)
        state |= {_LOCAL + name: _array(tensor) for name, tensor in self._binding.read_local().items()}
        result = self._binding.read() if at.returns == "weights" else self._binding.read_change(parcel.model)
        return Update(result, self.rows(at.client), loss, site.sent), state

    def _privately(
        self, at: Assignment, parcel: Parcel, state: ClientState, plan: PrivateSteps
    ) -> tuple[Update, ClientState]:
        work = at.work
        if not isinstance(work, Fit | Gradient):
            raise ConfigError(f"{type(work).__name__} is not done in private steps")
        data, rows, _ = self.load(at.client)
        plan.require(work, row_count(rows))
        if self._clipped is None:
            require_private(self.task, self._module)
            self._clipped = ClippedGradients(self.task, self._module)
        self._receive(parcel.model, state)
        steps = self._watched(iter(range(plan.steps)), plan.steps)
        with NoisyGradients(self._clipped, plan, data, rows, self.device) as noisy:
            self.done = noisy.done
            if isinstance(work, Fit):
                own = {name: array.copy() for name, array in state.items()}
                return self._fitted(at, work, parcel, own, steps, noisy)
            next(steps)
            noisy.write()
            return Update(self._taken_gradients(), row_count(rows)), state

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

    def _train(
        self, stream: Iterator[Any], site: LocalSite, parcel: Parcel, noisy: NoisyGradients | None
    ) -> float | None:
        if self.task.train is not None:
            loss = self.task.train(self._module, stream, site)
            return None if loss is None else float(loss)
        loop = Loop(self.task, self._module, self._binding, site.fit, self.device, noisy)
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
        return Update(self._taken_gradients(), count, float(loss.detach()))

    def _taken_gradients(self) -> Weights:
        gradient = self._binding.read_gradients()
        self._module.zero_grad(set_to_none=True)
        return gradient

    def rows(self, client: str) -> int:
        """How many rows there are to train on."""
        return row_count(self.load(client)[1])

    def smallest_class(self, client: str, work: Evaluate) -> int:
        """How many of the rows that are scored the rarest class has; all, where rows are not (features, targets)."""
        data, rows = self._scored(client, work)
        if self.task.step is not None:
            return row_count(rows)
        batches = all_rows(data, rows, work.batch_size, _CPU)
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
        assert not isinstance(work.query, Ranges)  # which take the model
        data, rows, _ = self.load(client)
        columns = (self.task.columns(batch) for batch, _ in all_rows(data, rows, 4096, _CPU))
        flat = ((x.reshape(len(x), -1).numpy(), y.numpy()) for x, y in columns)
        return Summary(work.query.answer(flat), row_count(rows))

    @staticmethod
    def _noised(work: Summarize, answer: Summary, steps: Steps | None) -> Summary:
        if steps is None:
            return answer
        assert isinstance(work.query, Moments | Ranges)  # the plan has refused everything else
        assert answer.vector.dtype == np.int64
        noise = Randomness().normal(len(answer.vector)) * (steps.noise_multiplier * work.query.sensitivity)
        return replace(answer, vector=noised(answer.vector, noise.numpy()))


def _loaded(
    task: Task, seed: int, holds_out_valid: bool, client: str
) -> tuple[Data, Dataset[Any], Dataset[Any] | None]:
    """A client's data, and of it the rows to train on and to validate with."""
    rng.seed_all(rng.seed_for(seed, "data", client))
    data = task.data(client)
    if not isinstance(data, Data):
        raise DataError(f"{client}: data() must return fedkit.Data, got {type(data).__name__}")
    if row_count(data.train) == 0:
        raise Refused(Reason.NO_DATA, f"{client} has no training rows")
    if holds_out_valid:
        return data, *split_valid(data, seed, client)
    return data, data.train, data.valid


def _watched(watch: Watch | None, stream: Iterator[T], total: int = 0) -> Iterator[T]:
    return stream if watch is None else _telling(watch, stream, total)


def _telling(watch: Watch, stream: Iterator[T], total: int) -> Iterator[T]:
    for done, batch in enumerate(stream):
        watch(done, total)
        yield batch


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    plain = tensor.detach().cpu()
    return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy().copy()
