from fedkit.protos import tensors_pb2 as _tensors_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SubmitRequest(_message.Message):
    __slots__ = ("run_file", "init_digest")
    RUN_FILE_FIELD_NUMBER: _ClassVar[int]
    INIT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    run_file: str
    init_digest: bytes
    def __init__(self, run_file: _Optional[str] = ..., init_digest: _Optional[bytes] = ...) -> None: ...

class StoredModel(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("clients", "runs", "software")
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    clients: _containers.RepeatedCompositeFieldContainer[Client]
    runs: _containers.RepeatedCompositeFieldContainer[Run]
    software: str
    def __init__(self, clients: _Optional[_Iterable[_Union[Client, _Mapping]]] = ..., runs: _Optional[_Iterable[_Union[Run, _Mapping]]] = ..., software: _Optional[str] = ...) -> None: ...

class Client(_message.Message):
    __slots__ = ("name", "state", "tasks", "since_s", "jobs", "last_refusal")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    LAST_REFUSAL_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    tasks: _containers.RepeatedScalarFieldContainer[str]
    since_s: float
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    last_refusal: str
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., tasks: _Optional[_Iterable[str]] = ..., since_s: _Optional[float] = ..., jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., last_refusal: _Optional[str] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("run", "round", "assignment_id", "work", "done", "total")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    assignment_id: str
    work: str
    done: int
    total: int
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., assignment_id: _Optional[str] = ..., work: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("name", "task", "strategy", "state", "round", "rounds", "seed", "detail", "submitted_at", "ended_at", "last", "models")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_AT_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    name: str
    task: str
    strategy: str
    state: str
    round: int
    rounds: int
    seed: int
    detail: str
    submitted_at: float
    ended_at: float
    last: Round
    models: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., task: _Optional[str] = ..., strategy: _Optional[str] = ..., state: _Optional[str] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., seed: _Optional[int] = ..., detail: _Optional[str] = ..., submitted_at: _Optional[float] = ..., ended_at: _Optional[float] = ..., last: _Optional[_Union[Round, _Mapping]] = ..., models: _Optional[_Iterable[str]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("run", "after_round")
    RUN_FIELD_NUMBER: _ClassVar[int]
    AFTER_ROUND_FIELD_NUMBER: _ClassVar[int]
    run: str
    after_round: int
    def __init__(self, run: _Optional[str] = ..., after_round: _Optional[int] = ...) -> None: ...

class RunEvent(_message.Message):
    __slots__ = ("round", "state")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    round: Round
    state: Run
    def __init__(self, round: _Optional[_Union[Round, _Mapping]] = ..., state: _Optional[_Union[Run, _Mapping]] = ...) -> None: ...

class Scores(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, float]
    def __init__(self, values: _Optional[_Mapping[str, float]] = ...) -> None: ...

class RoundRefusal(_message.Message):
    __slots__ = ("client", "reason", "detail")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    client: str
    reason: str
    detail: str
    def __init__(self, client: _Optional[str] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class Round(_message.Message):
    __slots__ = ("round", "attempt", "clients", "examples", "loss", "metrics", "per_client", "seconds", "bytes_up", "bytes_down", "refusals", "epsilon", "best", "rejected", "scored", "releases", "clip")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class PerClientEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Scores
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scores, _Mapping]] = ...) -> None: ...
    class EpsilonEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    PER_CLIENT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    clients: _containers.RepeatedScalarFieldContainer[str]
    examples: int
    loss: float
    metrics: _containers.ScalarMap[str, float]
    per_client: _containers.MessageMap[str, Scores]
    seconds: float
    bytes_up: int
    bytes_down: int
    refusals: _containers.RepeatedCompositeFieldContainer[RoundRefusal]
    epsilon: _containers.ScalarMap[str, float]
    best: bool
    rejected: str
    scored: _containers.RepeatedScalarFieldContainer[str]
    releases: int
    clip: float
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., clients: _Optional[_Iterable[str]] = ..., examples: _Optional[int] = ..., loss: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., per_client: _Optional[_Mapping[str, Scores]] = ..., seconds: _Optional[float] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., refusals: _Optional[_Iterable[_Union[RoundRefusal, _Mapping]]] = ..., epsilon: _Optional[_Mapping[str, float]] = ..., best: _Optional[bool] = ..., rejected: _Optional[str] = ..., scored: _Optional[_Iterable[str]] = ..., releases: _Optional[int] = ..., clip: _Optional[float] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("history", "abandoned", "test", "test_per_client", "refusals", "best", "run_file")
    class TestEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class TestPerClientEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Scores
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scores, _Mapping]] = ...) -> None: ...
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    ABANDONED_FIELD_NUMBER: _ClassVar[int]
    TEST_FIELD_NUMBER: _ClassVar[int]
    TEST_PER_CLIENT_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    RUN_FILE_FIELD_NUMBER: _ClassVar[int]
    history: _containers.RepeatedCompositeFieldContainer[Round]
    abandoned: _containers.RepeatedCompositeFieldContainer[Round]
    test: _containers.ScalarMap[str, float]
    test_per_client: _containers.MessageMap[str, Scores]
    refusals: _containers.RepeatedCompositeFieldContainer[RoundRefusal]
    best: Best
    run_file: str
    def __init__(self, history: _Optional[_Iterable[_Union[Round, _Mapping]]] = ..., abandoned: _Optional[_Iterable[_Union[Round, _Mapping]]] = ..., test: _Optional[_Mapping[str, float]] = ..., test_per_client: _Optional[_Mapping[str, Scores]] = ..., refusals: _Optional[_Iterable[_Union[RoundRefusal, _Mapping]]] = ..., best: _Optional[_Union[Best, _Mapping]] = ..., run_file: _Optional[str] = ...) -> None: ...

class Best(_message.Message):
    __slots__ = ("round", "metrics", "test")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class TestEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    TEST_FIELD_NUMBER: _ClassVar[int]
    round: int
    metrics: _containers.ScalarMap[str, float]
    test: _containers.ScalarMap[str, float]
    def __init__(self, round: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., test: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ModelRequest(_message.Message):
    __slots__ = ("run", "which", "offset")
    RUN_FIELD_NUMBER: _ClassVar[int]
    WHICH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    run: str
    which: str
    offset: int
    def __init__(self, run: _Optional[str] = ..., which: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...
