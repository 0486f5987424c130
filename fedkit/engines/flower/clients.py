"""Flower's clients as fedkit tasks: what a ClientApp or a NumPyClient does to train becomes the task's own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedkit.engines.flower.config import CONFIG, Config, config_from
from fedkit.engines.flower.library import flower, identify
from fedkit.errors import DataError, TaskError
from fedkit.task import Data, Site, Task

__all__ = ["client_task"]

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]

_STATE = "flower/context"
_FIT = {"lr": "lr", "epochs": "local-epochs", "steps": "local-steps", "batch_size": "batch-size"}


def client_task(
    app: Any,
    *,
    name: str,
    model: Callable[[], nn.Module],
    data: Callable[[str], Data],
    clients: Sequence[str] = (),
    run_config: Mapping[str, Any] | None = None,
    **about: Any,
) -> Task:
    """A task whose training is that of `app`: a `flwr.clientapp.ClientApp`, or a `client_fn(context)` of NumPyClients.

    A ClientApp gets the model as `arrays` and a `config`; a NumPyClient the values of `model().state_dict()` in order,
    and the config. That holds `server-round`, what the local work says (`lr`, `local-epochs`, `local-steps`,
    `batch-size`), and over it what a `FlowerStrategy` tells. `context.run_config` is `run_config`;
    `context.node_config` has `client` (its name) and, for one of `clients`, `partition-id` and `num-partitions`.
    `context.state` is kept at the client.

    The app trains on rows that it loads itself; fedkit counts and scores those of `data(client)`, which should be the
    same. `about` are further settings of `fedkit.Task`: `loss` or `predict` and `metrics`, so that models are scored.
    Raises `TaskError` for `prepare`, which would put a layer before a model that the app makes itself.
    """
    if about.get("prepare") is not None:
        raise TaskError(f"{name}: prepare puts a layer before the model, of which a Flower client knows nothing")
    loop = _Loop(app, tuple(clients), dict(run_config or {}))
    return Task(name=name, model=model, data=data, train=loop, **about)


class _Loop:
    """`train(model, batches, site)` that leaves all of it to an app."""

    def __init__(self, app: Any, clients: tuple[str, ...], run_config: dict[str, Any]) -> None:
        kind = flower("clientapp").ClientApp
        self._app = app if isinstance(app, kind) else kind(client_fn=app)
        self._is_older = getattr(self._app, "_call", None) is not None  # it was made of a client_fn
        self._clients = clients
        self._run_config = run_config

    def __call__(self, module: nn.Module, batches: Iterable[Any], site: Site) -> float | None:  # noqa: ARG002
        """Trains the module; returns the loss that the app reports as `train_loss` or `loss`, if any."""
        identify()
        kinds = flower("app")
        context = self._context(site)
        arrays = {name: _array(tensor) for name, tensor in module.state_dict().items()}
        content = (_asked_older if self._is_older else _asked)(arrays, _config(site))
        reply = self._app(kinds.Message(content, context.node_id, kinds.MessageType.TRAIN), context)
        if reply.has_error():
            raise DataError(f"the Flower client has failed: {reply.error.reason}")
        found, metrics = (_answered_older if self._is_older else _answered)(reply.content, list(arrays))
        module.load_state_dict({name: torch.tensor(values) for name, values in found.items()})
        site.state[_STATE] = _packed(context.state)
        loss = metrics.get("train_loss", metrics.get("loss"))
        return float(loss) if isinstance(loss, int | float) else None

    def _context(self, site: Site) -> Any:
        node: dict[str, Any] = {"client": site.client}
        number = 0
        if site.client in self._clients:
            number = self._clients.index(site.client)
            node |= {"partition-id": number, "num-partitions": len(self._clients)}
        about: Any = {"node_config": node, "run_config": dict(self._run_config)}
        return flower("app").Context(run_id=1, node_id=number + 1, state=_unpacked(site.state.get(_STATE)), **about)


def _config(site: Site) -> Config:
    """What the local work says, and over it what a strategy of Flower's tells its clients."""
    fit = site.fit.to_dict()
    own: Config = {name: fit[key] for key, name in _FIT.items() if fit.get(key) is not None}
    told = config_from(site.received[CONFIG]) if CONFIG in site.received else {}
    return {"server-round": site.round} | own | told


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    plain = tensor.detach().cpu()
    found: npt.NDArray[Any] = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    return found


# -- messages of a ClientApp, and those of a client_fn -----------------------------------------------------------------


def _asked(arrays: Arrays, config: Config) -> Any:
    app = flower("app")
    record = app.ArrayRecord({name: app.Array(np.ascontiguousarray(values)) for name, values in arrays.items()})
    return app.RecordDict({"arrays": record, "config": app.ConfigRecord(config)})


def _answered(content: Any, _: Sequence[str]) -> tuple[Arrays, Mapping[str, Any]]:
    """The one ArrayRecord of a reply, and its metrics; raises `DataError` where there is another number."""
    if len(content.array_records) != 1:
        raise DataError(f"the Flower client has answered with {len(content.array_records)} ArrayRecords, expected one")
    [record] = content.array_records.values()
    metrics = {key: value for one in content.metric_records.values() for key, value in one.items()}
    return {name: array.numpy() for name, array in record.items()}, metrics


def _asked_older(arrays: Arrays, config: Config) -> Any:
    parameters = flower("compat.common.parameter").ndarrays_to_parameters(list(arrays.values()))
    ins = flower("compat.common.typing").FitIns(parameters, dict(config))
    return flower("compat.common.recorddict_compat").fitins_to_recorddict(ins, keep_input=True)


def _answered_older(content: Any, names: Sequence[str]) -> tuple[Arrays, Mapping[str, Any]]:
    """The parameters of a reply under the names of the model's tensors; raises `DataError` where there are others."""
    result = flower("compat.common.recorddict_compat").recorddict_to_fitres(content, keep_input=True)
    values = flower("compat.common.parameter").parameters_to_ndarrays(result.parameters)
    if result.status.code.value or len(values) != len(names):
        what = result.status.message or f"{len(values)} arrays where the model has {len(names)} tensors"
        raise DataError(f"the Flower client has not trained: {what}")
    return dict(zip(names, values, strict=True)), result.metrics


# -- what an app keeps in its context ----------------------------------------------------------------------------------


def _packed(state: Any) -> npt.NDArray[np.uint8]:
    raw = flower("common.serde").recorddict_to_proto(state).SerializeToString()
    return np.frombuffer(raw, dtype=np.uint8)


def _unpacked(kept: npt.NDArray[Any] | None) -> Any:
    if kept is None:
        return flower("app").RecordDict()
    proto = flower("proto.recorddict_pb2").RecordDict.FromString(kept.tobytes())
    return flower("common.serde").recorddict_from_proto(proto)
