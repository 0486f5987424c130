"""What a caller checks before anything is sent, and what survives the way there and back."""

from __future__ import annotations

import json
import math
import re

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedkit
from fedkit import registry
from fedkit.errors import (
    ConfigError,
    DataError,
    FedkitError,
    IncompatibleStrategy,
    NameTaken,
    NoSuchRun,
    PayloadError,
    Reason,
    RunError,
    RunFailed,
    TaskError,
)
from fedkit.protos import convert_operators as convert
from fedkit.protos import failures
from fedkit.protos import operators_pb2 as pb
from fedkit.protos.convert import NAME
from fedkit.remote import _described, _made_up, connect
from fedkit.rounds.call import Refusal
from fedkit.rounds.journal import RoundRecord
from fedkit.runfile import RunFile
from fedkit.strategies import FedAvg
from fedkit.strategy import Strategy

TEXT = st.text(st.characters(exclude_categories=("C", "Z")), max_size=20)
COUNT = st.integers(0, (1 << 63) - 1)
REAL = st.floats(allow_nan=False)
VALUES = st.dictionaries(TEXT, REAL, max_size=4)


@pytest.mark.parametrize("address", ["localhost:8443", "127.0.0.1:8443", "127.9.9.9:1", "[::1]:8443"])
def test_loopback_needs_no_credentials(address: str) -> None:
    with connect(address) as coordinator:
        assert coordinator.address == address


@pytest.mark.parametrize(
    "address", ["coordinator:8443", "10.0.0.1:8443", "localhost.example:1", "0.0.0.0:1", "[2001:db8::1]:1"]
)
def test_off_loopback_credentials_are_needed(address: str) -> None:
    with pytest.raises(ConfigError, match=r"off loopback an identity is needed, .* give --identity FOLDER"):
        connect(address)


@pytest.mark.parametrize(
    "address", ["", "localhost", ":8443", "localhost:0", "localhost:70000", "unix:/tmp/x", "dns:///a:1", "::1:8443"]
)
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        connect(address)


def test_credentials_and_impatience_are_refused() -> None:
    with pytest.raises(ConfigError, match="credentials"):
        connect("localhost:1", object())
    with pytest.raises(ConfigError, match="patience_s"):
        connect("localhost:1", patience_s=-1)


def test_connect_is_the_packages_own() -> None:
    assert fedkit.connect is connect


NEEDED = {
    "FedSGD": {"lr": 0.1},
    "HandOver": {"graph": "0" * 64, "bounds": [1.0], "variants": ("int8",), "given": [(-1.0, 1.0)]},
    "NormClipping": {"max_norm": 1.0},
    "StochasticWeightTransfer": {"clients_per_round": 2},
}


@pytest.mark.parametrize("name", registry.strategies())
def test_every_registered_strategy_travels_with_all_its_settings(name: str) -> None:
    strategy = registry.find_strategy(name)(**NEEDED.get(name, {}))
    values = {"run": {"name": "one", "task": "toy"}, "strategy": _described(strategy)}
    sent = json.loads(RunFile(**values).to_json())
    assert "simulation" not in sent
    assert RunFile(**sent).build_strategy() == strategy


def test_a_class_that_only_shares_a_registered_name_is_refused() -> None:
    other = type("FedAvg", (Strategy,), {"__module__": "mine"})
    with pytest.raises(ConfigError, match=r"mine.FedAvg is not the strategy registered as FedAvg"):
        _described(other())


def test_state_that_would_stay_behind_is_refused() -> None:
    strategy = FedAvg()
    strategy.momentum = 1.0
    with pytest.raises(ConfigError, match=r"state \(momentum\) that does not travel"):
        _described(strategy)


def test_a_setting_that_json_cannot_say_is_refused() -> None:
    class Endless(Strategy):
        rate: float = math.inf

    file = RunFile(run={"name": "one", "task": "toy"}, strategy=_described(Endless()))
    with pytest.raises(ConfigError, match="does not travel"):
        file.to_json()


@pytest.mark.parametrize("task", ["heart", "Ünï cödé / ../x", "", "x" * 300, "_.-"])
def test_a_name_that_is_made_up_is_one_a_run_may_have(task: str) -> None:
    assert NAME.fullmatch(_made_up(task, "FedAvg", 3))
    assert _made_up(task, "FedAvg", 3) != _made_up(task, "FedAvg", 3)
    assert re.fullmatch("heart-fedavg-3-[0-9a-f]{8}", _made_up("heart", "FedAvg", 3))


@given(
    st.builds(
        RoundRecord,
        round=st.integers(-1, 1 << 40),
        attempt=COUNT,
        clients=st.lists(TEXT, max_size=3).map(tuple),
        examples=COUNT,
        loss=st.none() | REAL,
        metrics=VALUES,
        per_client=st.dictionaries(TEXT, VALUES, max_size=3),
        seconds=REAL,
        bytes_up=COUNT,
        bytes_down=COUNT,
        refusals=st.lists(st.builds(Refusal, TEXT, st.sampled_from(Reason), TEXT), max_size=3).map(tuple),
        epsilon=VALUES,
        best=st.booleans(),
        rejected=TEXT,
        scored=st.lists(TEXT, max_size=3).map(tuple),
    )
)
def test_a_record_comes_back_as_it_was(record: RoundRecord) -> None:
    raw = convert.record_to_proto(record).SerializeToString()
    found = convert.record_from_proto(pb.Round.FromString(raw))
    assert found == record
    assert [name for name in found.metrics if name == "loss"] == list(found.metrics)[: "loss" in found.metrics]


def test_a_reason_from_a_newer_coordinator_is_kept_as_words() -> None:
    message = pb.Round(refusals=[pb.RoundRefusal(client="va", reason="moon", detail="full\x07")])
    assert convert.record_from_proto(message).refusals == (Refusal("va", Reason.FAILED, "moon: full "),)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NameTaken("x"), "ALREADY_EXISTS"),
        (NoSuchRun("x"), "NOT_FOUND"),
        (ConfigError("x"), "INVALID_ARGUMENT"),
        (TaskError("x"), "INVALID_ARGUMENT"),
        (DataError("x"), "INVALID_ARGUMENT"),
        (IncompatibleStrategy("x"), "INVALID_ARGUMENT"),
        (PayloadError("x"), "INVALID_ARGUMENT"),
        (RunError("x"), "FAILED_PRECONDITION"),
        (RunFailed("x"), "FAILED_PRECONDITION"),
    ],
)
def test_an_error_has_one_code_and_comes_back_as_itself(error: FedkitError, code: str) -> None:
    assert failures.code_of(error).name == code
    found = failures.error_from(failures.code_of(error), str(error), type(error).__name__)
    assert (type(found), str(found)) == (type(error), "x")


def test_a_code_of_nobody_is_no_error_of_ours() -> None:
    assert failures.error_from(grpc.StatusCode.INTERNAL, "x", "ConfigError") is None
    assert type(failures.error_from(grpc.StatusCode.NOT_FOUND, "a\x1b\nb", "SystemExit")) is NoSuchRun
    assert str(failures.error_from(grpc.StatusCode.NOT_FOUND, "a\x1b\nb", "")) == "a \nb"


def test_a_long_error_is_cut_to_what_a_status_holds() -> None:
    assert failures.error_text(ConfigError("short")) == "short"
    text = failures.error_text(ConfigError("ü" * 5000))
    assert len(text.encode()) <= 2004
    assert text.endswith(" ...")
