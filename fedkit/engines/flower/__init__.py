"""Flower, both ways: fedkit's tasks and strategies on Flower's engines, Flower's strategies and clients on fedkit's.

`run` trains on Flower's simulation engine; `apps` gives the two apps for a SuperLink and its SuperNodes.
`FlowerStrategy` makes a strategy of `flwr.serverapp.strategy` a fedkit strategy, `client_task` a ClientApp a fedkit
task. Needs `pip install fedkit[flower]`, which is asked for when one of them is first used.
"""

from fedkit.engines.flower.apps import apps, run
from fedkit.engines.flower.clients import client_task
from fedkit.engines.flower.strategy import FlowerStrategy

__all__ = ["FlowerStrategy", "apps", "client_task", "run"]
