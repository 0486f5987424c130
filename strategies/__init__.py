"""The strategies that come with fedkit, each a class with one coroutine that reads like its paper."""

from fedkit.strategies.adaptive import FedAdagrad, FedAdam, FedAvgM, FedYogi
from fedkit.strategies.asynchronous import FedBuff
from fedkit.strategies.averaging import FedAvg
from fedkit.strategies.gradient import FedSGD
from fedkit.strategies.handover import HandOver
from fedkit.strategies.robust import CoordinateMedian, Krum, MultiKrum, NormClipping, TrimmedMean
from fedkit.strategies.scaffold import Scaffold
from fedkit.strategies.transfer import CyclicWeightTransfer, SingleWeightTransfer, StochasticWeightTransfer

__all__ = [
    "CoordinateMedian",
    "CyclicWeightTransfer",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBuff",
    "FedSGD",
    "FedYogi",
    "HandOver",
    "Krum",
    "MultiKrum",
    "NormClipping",
    "Scaffold",
    "SingleWeightTransfer",
    "StochasticWeightTransfer",
    "TrimmedMean",
]
