from fedkit.protos import tensors_pb2 as _tensors_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Returns(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RETURNS_UNSPECIFIED: _ClassVar[Returns]
    UPDATE: _ClassVar[Returns]
    WEIGHTS: _ClassVar[Returns]
    SUMS: _ClassVar[Returns]
    WORDS: _ClassVar[Returns]
    REPLY: _ClassVar[Returns]
RETURNS_UNSPECIFIED: Returns
UPDATE: Returns
WEIGHTS: Returns
SUMS: Returns
WORDS: Returns
REPLY: Returns

class DescribeRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class RunDescription(_message.Message):
    __slots__ = ("run_file", "aggregation", "state", "clients")
    RUN_FILE_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    run_file: str
    aggregation: str
    state: str
    clients: int
    def __init__(self, run_file: _Optional[str] = ..., aggregation: _Optional[str] = ..., state: _Optional[str] = ..., clients: _Optional[int] = ...) -> None: ...

class FromAgent(_message.Message):
    __slots__ = ("hello", "heartbeat", "progress", "sums", "refusal", "leaving", "update", "payload")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    progress: Progress
    sums: Sums
    refusal: Refusal
    leaving: Leaving
    update: Announcement
    payload: bytes
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., sums: _Optional[_Union[Sums, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ..., update: _Optional[_Union[Announcement, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "client", "instance", "software", "tasks", "max_examples", "held", "running", "voucher", "min_cohort")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    MAX_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    VOUCHER_FIELD_NUMBER: _ClassVar[int]
    MIN_COHORT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    client: str
    instance: bytes
    software: str
    tasks: _containers.RepeatedScalarFieldContainer[str]
    max_examples: int
    held: _containers.RepeatedScalarFieldContainer[str]
    running: _containers.RepeatedScalarFieldContainer[str]
    voucher: Voucher
    min_cohort: int
    def __init__(self, protocol: _Optional[int] = ..., client: _Optional[str] = ..., instance: _Optional[bytes] = ..., software: _Optional[str] = ..., tasks: _Optional[_Iterable[str]] = ..., max_examples: _Optional[int] = ..., held: _Optional[_Iterable[str]] = ..., running: _Optional[_Iterable[str]] = ..., voucher: _Optional[_Union[Voucher, _Mapping]] = ..., min_cohort: _Optional[int] = ...) -> None: ...

class Voucher(_message.Message):
    __slots__ = ("name", "expires", "signature")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    expires: int
    signature: bytes
    def __init__(self, name: _Optional[str] = ..., expires: _Optional[int] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("voucher",)
    VOUCHER_FIELD_NUMBER: _ClassVar[int]
    voucher: Voucher
    def __init__(self, voucher: _Optional[_Union[Voucher, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("assignment_id", "done", "total")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    done: int
    total: int
    def __init__(self, assignment_id: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class Sums(_message.Message):
    __slots__ = ("assignment_id", "reals", "integers", "reply", "examples", "released")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    REALS_FIELD_NUMBER: _ClassVar[int]
    INTEGERS_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    reals: Reals
    integers: Integers
    reply: bytes
    examples: int
    released: bool
    def __init__(self, assignment_id: _Optional[str] = ..., reals: _Optional[_Union[Reals, _Mapping]] = ..., integers: _Optional[_Union[Integers, _Mapping]] = ..., reply: _Optional[bytes] = ..., examples: _Optional[int] = ..., released: _Optional[bool] = ...) -> None: ...

class Reals(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class Integers(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[int]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("assignment_id", "reason", "detail")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    reason: str
    detail: str
    def __init__(self, assignment_id: _Optional[str] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ToAgent(_message.Message):
    __slots__ = ("welcome", "heartbeat", "assignment", "cancel", "settlement", "goodbye", "refused", "payload")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    SETTLEMENT_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    heartbeat: Heartbeat
    assignment: Assignment
    cancel: Cancel
    settlement: Settlement
    goodbye: Goodbye
    refused: Refusal
    payload: bytes
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., assignment: _Optional[_Union[Assignment, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., settlement: _Optional[_Union[Settlement, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., refused: _Optional[_Union[Refusal, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("session", "heartbeat_s", "settlement", "roster")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    SETTLEMENT_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    heartbeat_s: float
    settlement: Settlement
    roster: str
    def __init__(self, session: _Optional[bytes] = ..., heartbeat_s: _Optional[float] = ..., settlement: _Optional[_Union[Settlement, _Mapping]] = ..., roster: _Optional[str] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("id", "run", "task", "strategy", "seed", "round", "returns", "holds_out_valid", "model_digest", "model_bytes", "manifest_digest", "extras", "settlement", "manifest", "roster_version", "roster_digest", "aggregation", "cohort", "private", "clip", "masking", "sealing", "fit", "gradient", "evaluate", "summarize")
    ID_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    RETURNS_FIELD_NUMBER: _ClassVar[int]
    HOLDS_OUT_VALID_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_BYTES_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    SETTLEMENT_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    ROSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROSTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    MASKING_FIELD_NUMBER: _ClassVar[int]
    SEALING_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    SUMMARIZE_FIELD_NUMBER: _ClassVar[int]
    id: str
    run: str
    task: str
    strategy: str
    seed: int
    round: int
    returns: Returns
    holds_out_valid: bool
    model_digest: bytes
    model_bytes: int
    manifest_digest: bytes
    extras: _containers.RepeatedCompositeFieldContainer[_tensors_pb2.Extra]
    settlement: Settlement
    manifest: str
    roster_version: int
    roster_digest: bytes
    aggregation: str
    cohort: _containers.RepeatedCompositeFieldContainer[Voucher]
    private: Private
    clip: Clip
    masking: Masking
    sealing: Sealing
    fit: Fit
    gradient: Gradient
    evaluate: Evaluate
    summarize: Summarize
    def __init__(self, id: _Optional[str] = ..., run: _Optional[str] = ..., task: _Optional[str] = ..., strategy: _Optional[str] = ..., seed: _Optional[int] = ..., round: _Optional[int] = ..., returns: _Optional[_Union[Returns, str]] = ..., holds_out_valid: _Optional[bool] = ..., model_digest: _Optional[bytes] = ..., model_bytes: _Optional[int] = ..., manifest_digest: _Optional[bytes] = ..., extras: _Optional[_Iterable[_Union[_tensors_pb2.Extra, _Mapping]]] = ..., settlement: _Optional[_Union[Settlement, _Mapping]] = ..., manifest: _Optional[str] = ..., roster_version: _Optional[int] = ..., roster_digest: _Optional[bytes] = ..., aggregation: _Optional[str] = ..., cohort: _Optional[_Iterable[_Union[Voucher, _Mapping]]] = ..., private: _Optional[_Union[Private, _Mapping]] = ..., clip: _Optional[_Union[Clip, _Mapping]] = ..., masking: _Optional[_Union[Masking, _Mapping]] = ..., sealing: _Optional[_Union[Sealing, _Mapping]] = ..., fit: _Optional[_Union[Fit, _Mapping]] = ..., gradient: _Optional[_Union[Gradient, _Mapping]] = ..., evaluate: _Optional[_Union[Evaluate, _Mapping]] = ..., summarize: _Optional[_Union[Summarize, _Mapping]] = ...) -> None: ...

class Private(_message.Message):
    __slots__ = ("epsilon", "noise_multiplier", "delta", "max_grad_norm", "visits", "questions", "noise", "dropouts", "colluders")
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    VISITS_FIELD_NUMBER: _ClassVar[int]
    QUESTIONS_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    DROPOUTS_FIELD_NUMBER: _ClassVar[int]
    COLLUDERS_FIELD_NUMBER: _ClassVar[int]
    epsilon: float
    noise_multiplier: float
    delta: float
    max_grad_norm: float
    visits: int
    questions: int
    noise: str
    dropouts: int
    colluders: int
    def __init__(self, epsilon: _Optional[float] = ..., noise_multiplier: _Optional[float] = ..., delta: _Optional[float] = ..., max_grad_norm: _Optional[float] = ..., visits: _Optional[int] = ..., questions: _Optional[int] = ..., noise: _Optional[str] = ..., dropouts: _Optional[int] = ..., colluders: _Optional[int] = ...) -> None: ...

class Clip(_message.Message):
    __slots__ = ("norm", "tells")
    NORM_FIELD_NUMBER: _ClassVar[int]
    TELLS_FIELD_NUMBER: _ClassVar[int]
    norm: float
    tells: bool
    def __init__(self, norm: _Optional[float] = ..., tells: _Optional[bool] = ...) -> None: ...

class Masking(_message.Message):
    __slots__ = ("call", "step", "layout", "message")
    CALL_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    call: str
    step: str
    layout: str
    message: bytes
    def __init__(self, call: _Optional[str] = ..., step: _Optional[str] = ..., layout: _Optional[str] = ..., message: _Optional[bytes] = ...) -> None: ...

class Sealing(_message.Message):
    __slots__ = ("boxes", "words")
    BOXES_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    boxes: _containers.RepeatedScalarFieldContainer[bytes]
    words: int
    def __init__(self, boxes: _Optional[_Iterable[bytes]] = ..., words: _Optional[int] = ...) -> None: ...

class Fit(_message.Message):
    __slots__ = ("epochs", "steps", "batch_size", "lr", "proximal", "control_variates", "mixed_precision", "gate", "quantize_from")
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    PROXIMAL_FIELD_NUMBER: _ClassVar[int]
    CONTROL_VARIATES_FIELD_NUMBER: _ClassVar[int]
    MIXED_PRECISION_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZE_FROM_FIELD_NUMBER: _ClassVar[int]
    epochs: int
    steps: int
    batch_size: int
    lr: float
    proximal: float
    control_variates: bool
    mixed_precision: bool
    gate: Gate
    quantize_from: int
    def __init__(self, epochs: _Optional[int] = ..., steps: _Optional[int] = ..., batch_size: _Optional[int] = ..., lr: _Optional[float] = ..., proximal: _Optional[float] = ..., control_variates: _Optional[bool] = ..., mixed_precision: _Optional[bool] = ..., gate: _Optional[_Union[Gate, _Mapping]] = ..., quantize_from: _Optional[int] = ...) -> None: ...

class Gate(_message.Message):
    __slots__ = ("max_norm", "max_ratio", "max_drop", "metric")
    MAX_NORM_FIELD_NUMBER: _ClassVar[int]
    MAX_RATIO_FIELD_NUMBER: _ClassVar[int]
    MAX_DROP_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    max_norm: float
    max_ratio: float
    max_drop: float
    metric: str
    def __init__(self, max_norm: _Optional[float] = ..., max_ratio: _Optional[float] = ..., max_drop: _Optional[float] = ..., metric: _Optional[str] = ...) -> None: ...

class Gradient(_message.Message):
    __slots__ = ("batch_size",)
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    batch_size: int
    def __init__(self, batch_size: _Optional[int] = ...) -> None: ...

class Evaluate(_message.Message):
    __slots__ = ("split", "batch_size", "exam")
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    EXAM_FIELD_NUMBER: _ClassVar[int]
    split: str
    batch_size: int
    exam: Exam
    def __init__(self, split: _Optional[str] = ..., batch_size: _Optional[int] = ..., exam: _Optional[_Union[Exam, _Mapping]] = ...) -> None: ...

class Exam(_message.Message):
    __slots__ = ("graph", "variant", "noise", "criteria", "groups")
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    CRITERIA_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    graph: str
    variant: str
    noise: float
    criteria: _containers.RepeatedScalarFieldContainer[str]
    groups: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, graph: _Optional[str] = ..., variant: _Optional[str] = ..., noise: _Optional[float] = ..., criteria: _Optional[_Iterable[str]] = ..., groups: _Optional[_Iterable[str]] = ...) -> None: ...

class Summarize(_message.Message):
    __slots__ = ("moments", "histogram", "label_counts", "row_count", "ranges")
    MOMENTS_FIELD_NUMBER: _ClassVar[int]
    HISTOGRAM_FIELD_NUMBER: _ClassVar[int]
    LABEL_COUNTS_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    moments: Moments
    histogram: Histogram
    label_counts: LabelCounts
    row_count: RowCount
    ranges: Ranges
    def __init__(self, moments: _Optional[_Union[Moments, _Mapping]] = ..., histogram: _Optional[_Union[Histogram, _Mapping]] = ..., label_counts: _Optional[_Union[LabelCounts, _Mapping]] = ..., row_count: _Optional[_Union[RowCount, _Mapping]] = ..., ranges: _Optional[_Union[Ranges, _Mapping]] = ...) -> None: ...

class Moments(_message.Message):
    __slots__ = ("bounds",)
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    bounds: _containers.RepeatedCompositeFieldContainer[Interval]
    def __init__(self, bounds: _Optional[_Iterable[_Union[Interval, _Mapping]]] = ...) -> None: ...

class Interval(_message.Message):
    __slots__ = ("low", "high")
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    low: float
    high: float
    def __init__(self, low: _Optional[float] = ..., high: _Optional[float] = ...) -> None: ...

class Histogram(_message.Message):
    __slots__ = ("feature", "edges")
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    EDGES_FIELD_NUMBER: _ClassVar[int]
    feature: int
    edges: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, feature: _Optional[int] = ..., edges: _Optional[_Iterable[float]] = ...) -> None: ...

class Ranges(_message.Message):
    __slots__ = ("graph", "bounds", "rows", "method", "per_row")
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    PER_ROW_FIELD_NUMBER: _ClassVar[int]
    graph: str
    bounds: _containers.RepeatedScalarFieldContainer[float]
    rows: int
    method: str
    per_row: bool
    def __init__(self, graph: _Optional[str] = ..., bounds: _Optional[_Iterable[float]] = ..., rows: _Optional[int] = ..., method: _Optional[str] = ..., per_row: _Optional[bool] = ...) -> None: ...

class RowCount(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LabelCounts(_message.Message):
    __slots__ = ("classes",)
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    classes: int
    def __init__(self, classes: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("assignment_id",)
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    def __init__(self, assignment_id: _Optional[str] = ...) -> None: ...

class Settlement(_message.Message):
    __slots__ = ("accepted", "dropped")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    accepted: _containers.RepeatedScalarFieldContainer[str]
    dropped: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, accepted: _Optional[_Iterable[str]] = ..., dropped: _Optional[_Iterable[str]] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason", "detail")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[Goodbye.Reason]
        PROTOCOL: _ClassVar[Goodbye.Reason]
        REPLACED: _ClassVar[Goodbye.Reason]
        MALFORMED: _ClassVar[Goodbye.Reason]
        STOPPING: _ClassVar[Goodbye.Reason]
    REASON_UNSPECIFIED: Goodbye.Reason
    PROTOCOL: Goodbye.Reason
    REPLACED: Goodbye.Reason
    MALFORMED: Goodbye.Reason
    STOPPING: Goodbye.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    reason: Goodbye.Reason
    detail: str
    def __init__(self, reason: _Optional[_Union[Goodbye.Reason, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("assignment_id", "offset", "header")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    offset: int
    header: bool
    def __init__(self, assignment_id: _Optional[str] = ..., offset: _Optional[int] = ..., header: _Optional[bool] = ...) -> None: ...

class UploadPiece(_message.Message):
    __slots__ = ("announcement", "data")
    ANNOUNCEMENT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    announcement: Announcement
    data: bytes
    def __init__(self, announcement: _Optional[_Union[Announcement, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Announcement(_message.Message):
    __slots__ = ("assignment_id", "examples", "loss", "extras", "payload_bytes", "digest", "epsilon", "at_once")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    AT_ONCE_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    examples: int
    loss: float
    extras: _containers.RepeatedCompositeFieldContainer[_tensors_pb2.Extra]
    payload_bytes: int
    digest: bytes
    epsilon: float
    at_once: bool
    def __init__(self, assignment_id: _Optional[str] = ..., examples: _Optional[int] = ..., loss: _Optional[float] = ..., extras: _Optional[_Iterable[_Union[_tensors_pb2.Extra, _Mapping]]] = ..., payload_bytes: _Optional[int] = ..., digest: _Optional[bytes] = ..., epsilon: _Optional[float] = ..., at_once: _Optional[bool] = ...) -> None: ...

class UploadReply(_message.Message):
    __slots__ = ("have", "taken", "refused")
    HAVE_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    have: int
    taken: Taken
    refused: Refusal
    def __init__(self, have: _Optional[int] = ..., taken: _Optional[_Union[Taken, _Mapping]] = ..., refused: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Taken(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
