"""Runs and bundles in MLflow: a server's, or a database's on this machine."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedkit.errors import ConfigError
from fedkit.tracking.events import MODEL, Begun, Ended, Event, Scores, Shipped

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["ALIAS", "BUNDLE", "MLflow"]

ALIAS = "candidate"  # of the version that was registered last
BUNDLE = "bundle"  # the folder among a run's artifacts; bundle-2 and so on where it is exported again

_STATES = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_PAUSE_S = 1.0  # rounds are sent together where they come faster than this
_AT_ONCE, _PARAMS_AT_ONCE, _LONGEST = 1000, 100, 500  # what MLflow takes in one request, and of one parameter
# A server that is gone must not hold up a run, and a run must not be told to anybody but that server.
_SURROUNDINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_ODD = re.compile(r"[^\w\-. /]")


class MLflow:
    """A tracker: a run becomes a run of the experiment that has the task's name, or MLFLOW_EXPERIMENT_NAME.

    `uri` is MLflow's tracking URI (None: MLFLOW_TRACKING_URI). A bundle becomes the artifacts of its run, and a version
    of the registered model that has the task's name, with the alias "candidate". Raises `ConfigError` where MLflow is
    not installed. Settings of MLflow's own that the environment does not have are made: few retries, ten seconds for
    a request, no telemetry.
    """

    def __init__(self, uri: str | None = None) -> None:
        for name, value in _SURROUNDINGS.items():
            os.environ.setdefault(name, value)
        try:
            import mlflow  # noqa: F401
        except ImportError:
            raise ConfigError("tracking with MLflow needs its client: pip install fedkit[mlflow]") from None
        self._uri = uri
        self._connected: MlflowClient | None = None
        self._run = ""
        self._waiting: list[Any] = []
        self._sent_at = -_PAUSE_S

    def __call__(self, event: Event) -> None:
        """Writes one event down; raises what MLflow raises."""
        if isinstance(event, Begun):
            self._begin(event)
        elif isinstance(event, Shipped):
            self._register(event)
        elif isinstance(event, Ended):
            self._end(event)
        else:
            self._measure(event.metrics, event.round)

    @property
    def _client(self) -> MlflowClient:
        if self._connected is None:
            from mlflow import MlflowClient

            self._connected = MlflowClient(self._uri)
        return self._connected

    def _begin(self, event: Begun) -> None:
        from mlflow.entities import Param

        made = self._client.create_run(self._experiment(event), run_name=event.run, tags=dict(event.tags))
        self._run = made.info.run_id
        params = [Param(_name(name), str(value)[:_LONGEST]) for name, value in event.params.items()]
        for some in _pieces(params, _PARAMS_AT_ONCE):
            self._client.log_batch(self._run, params=some)

    def _experiment(self, event: Begun) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or event.task
        found = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if found is None else found.experiment_id)

    def _measure(self, metrics: Scores, step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(_name(name), value, now, step) for name, value in metrics.items()]
        if time.monotonic() - self._sent_at >= _PAUSE_S:
            self._send()

    def _send(self) -> None:
        waiting, self._waiting, self._sent_at = self._waiting, [], time.monotonic()
        for some in _pieces(waiting, _AT_ONCE):
            self._client.log_batch(self._run, metrics=some)

    def _end(self, event: Ended) -> None:
        self._measure(event.metrics, event.round)
        self._send()
        self._tag(event.tags)
        self._client.set_terminated(self._run, _STATES[event.state])

    def _tag(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self._run, tags=[RunTag(name, value) for name, value in tags.items()])

    def _register(self, event: Shipped) -> None:
        """The run that ended with this model, or one made of its story, gets the bundle and a registered version."""
        self._run = self._find(event) or self._tell(event)
        place = self._free_place()
        self._client.log_artifacts(self._run, str(event.folder), place)
        self._name(event.name)
        source = f"runs:/{self._run}/{place}"
        made = self._client.create_model_version(event.name, source, self._run, tags=dict(event.tags))
        self._client.set_registered_model_alias(event.name, ALIAS, made.version)

    def _find(self, event: Shipped) -> str | None:
        where = [self._experiment(one) for one in event.story if isinstance(one, Begun)]
        found = self._client.search_runs(where, f"tags.`{MODEL}` = '{event.model}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _tell(self, event: Shipped) -> str:
        for one in event.story:
            self(one)
        return self._run

    def _free_place(self) -> str:
        """A folder for a bundle: a run that is exported again keeps the one before, which is a version too."""
        taken = {one.path for one in self._client.list_artifacts(self._run)}
        places = (BUNDLE if count == 1 else f"{BUNDLE}-{count}" for count in itertools.count(1))
        return next(place for place in places if place not in taken)

    def _name(self, model: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _name(text: str) -> str:
    """A name of a parameter or metric as MLflow takes it."""
    return _ODD.sub("_", text)[:250]


def _pieces(values: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), most):
        yield values[start : start + most]
