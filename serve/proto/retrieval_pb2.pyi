from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Query(_message.Message):
    __slots__ = ("vector", "image", "image_id")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    vector: bytes
    image: bytes
    image_id: str
    def __init__(self, vector: _Optional[bytes] = ..., image: _Optional[bytes] = ..., image_id: _Optional[str] = ...) -> None: ...

class SearchOptions(_message.Message):
    __slots__ = ("k", "plan", "timeout_ms", "model_fingerprint", "allow_partial", "filters", "min_recall", "session")
    K_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ALLOW_PARTIAL_FIELD_NUMBER: _ClassVar[int]
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    MIN_RECALL_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    k: int
    plan: Plan
    timeout_ms: int
    model_fingerprint: str
    allow_partial: bool
    filters: _containers.RepeatedCompositeFieldContainer[Filter]
    min_recall: float
    session: str
    def __init__(self, k: _Optional[int] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., timeout_ms: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., allow_partial: _Optional[bool] = ..., filters: _Optional[_Iterable[_Union[Filter, _Mapping]]] = ..., min_recall: _Optional[float] = ..., session: _Optional[str] = ...) -> None: ...

class Filter(_message.Message):
    __slots__ = ("column", "values")
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    column: str
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, column: _Optional[str] = ..., values: _Optional[_Iterable[str]] = ...) -> None: ...

class PlanStep(_message.Message):
    __slots__ = ("dim", "keep")
    DIM_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    dim: int
    keep: int
    def __init__(self, dim: _Optional[int] = ..., keep: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("shortlist_dim", "shortlist_k", "stages", "rerank_dim", "ef_search", "scan", "nprobe", "margins")
    SHORTLIST_DIM_FIELD_NUMBER: _ClassVar[int]
    SHORTLIST_K_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    RERANK_DIM_FIELD_NUMBER: _ClassVar[int]
    EF_SEARCH_FIELD_NUMBER: _ClassVar[int]
    SCAN_FIELD_NUMBER: _ClassVar[int]
    NPROBE_FIELD_NUMBER: _ClassVar[int]
    MARGINS_FIELD_NUMBER: _ClassVar[int]
    shortlist_dim: int
    shortlist_k: int
    stages: _containers.RepeatedCompositeFieldContainer[PlanStep]
    rerank_dim: int
    ef_search: int
    scan: bool
    nprobe: int
    margins: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, shortlist_dim: _Optional[int] = ..., shortlist_k: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[PlanStep, _Mapping]]] = ..., rerank_dim: _Optional[int] = ..., ef_search: _Optional[int] = ..., scan: _Optional[bool] = ..., nprobe: _Optional[int] = ..., margins: _Optional[_Iterable[float]] = ...) -> None: ...

class Hit(_message.Message):
    __slots__ = ("id", "score", "metadata", "arm")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    id: str
    score: float
    metadata: _containers.ScalarMap[str, str]
    arm: str
    def __init__(self, id: _Optional[str] = ..., score: _Optional[float] = ..., metadata: _Optional[_Mapping[str, str]] = ..., arm: _Optional[str] = ...) -> None: ...

class HitList(_message.Message):
    __slots__ = ("hits",)
    HITS_FIELD_NUMBER: _ClassVar[int]
    hits: _containers.RepeatedCompositeFieldContainer[Hit]
    def __init__(self, hits: _Optional[_Iterable[_Union[Hit, _Mapping]]] = ...) -> None: ...

class Coverage(_message.Message):
    __slots__ = ("shards_answered", "shards_asked")
    SHARDS_ANSWERED_FIELD_NUMBER: _ClassVar[int]
    SHARDS_ASKED_FIELD_NUMBER: _ClassVar[int]
    shards_answered: int
    shards_asked: int
    def __init__(self, shards_answered: _Optional[int] = ..., shards_asked: _Optional[int] = ...) -> None: ...

class StageTime(_message.Message):
    __slots__ = ("stage", "duration_ms")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    stage: str
    duration_ms: float
    def __init__(self, stage: _Optional[str] = ..., duration_ms: _Optional[float] = ...) -> None: ...

class SearchInfo(_message.Message):
    __slots__ = ("plan", "index_generation", "model_fingerprint", "coverage", "stage_times", "request_id", "arm", "degraded")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    INDEX_GENERATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    STAGE_TIMES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    index_generation: str
    model_fingerprint: str
    coverage: Coverage
    stage_times: _containers.RepeatedCompositeFieldContainer[StageTime]
    request_id: str
    arm: str
    degraded: bool
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ..., index_generation: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., coverage: _Optional[_Union[Coverage, _Mapping]] = ..., stage_times: _Optional[_Iterable[_Union[StageTime, _Mapping]]] = ..., request_id: _Optional[str] = ..., arm: _Optional[str] = ..., degraded: _Optional[bool] = ...) -> None: ...

class SearchRequest(_message.Message):
    __slots__ = ("query", "options")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    query: Query
    options: SearchOptions
    def __init__(self, query: _Optional[_Union[Query, _Mapping]] = ..., options: _Optional[_Union[SearchOptions, _Mapping]] = ...) -> None: ...

class SearchResponse(_message.Message):
    __slots__ = ("hits", "info")
    HITS_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    hits: _containers.RepeatedCompositeFieldContainer[Hit]
    info: SearchInfo
    def __init__(self, hits: _Optional[_Iterable[_Union[Hit, _Mapping]]] = ..., info: _Optional[_Union[SearchInfo, _Mapping]] = ...) -> None: ...

class SearchBatchRequest(_message.Message):
    __slots__ = ("queries", "options")
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    queries: _containers.RepeatedCompositeFieldContainer[Query]
    options: SearchOptions
    def __init__(self, queries: _Optional[_Iterable[_Union[Query, _Mapping]]] = ..., options: _Optional[_Union[SearchOptions, _Mapping]] = ...) -> None: ...

class SearchStreamRequest(_message.Message):
    __slots__ = ("tag", "batch")
    TAG_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    tag: str
    batch: SearchBatchRequest
    def __init__(self, tag: _Optional[str] = ..., batch: _Optional[_Union[SearchBatchRequest, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class SearchStreamResponse(_message.Message):
    __slots__ = ("tag", "batch", "failure")
    TAG_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    tag: str
    batch: SearchBatchResponse
    failure: Failure
    def __init__(self, tag: _Optional[str] = ..., batch: _Optional[_Union[SearchBatchResponse, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class SearchBatchResponse(_message.Message):
    __slots__ = ("results", "info")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[HitList]
    info: SearchInfo
    def __init__(self, results: _Optional[_Iterable[_Union[HitList, _Mapping]]] = ..., info: _Optional[_Union[SearchInfo, _Mapping]] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("images",)
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, images: _Optional[_Iterable[bytes]] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("vectors", "dim", "model_fingerprint")
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    vectors: _containers.RepeatedScalarFieldContainer[bytes]
    dim: int
    model_fingerprint: str
    def __init__(self, vectors: _Optional[_Iterable[bytes]] = ..., dim: _Optional[int] = ..., model_fingerprint: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_k", "max_batch", "max_image_bytes", "max_pixels", "max_shortlist_k", "max_filter_values", "max_request_bytes", "max_id_bytes", "max_metadata_bytes", "max_scans", "max_decode_s", "max_hits", "max_filter_bytes")
    MAX_K_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_SHORTLIST_K_FIELD_NUMBER: _ClassVar[int]
    MAX_FILTER_VALUES_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ID_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_METADATA_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SCANS_FIELD_NUMBER: _ClassVar[int]
    MAX_DECODE_S_FIELD_NUMBER: _ClassVar[int]
    MAX_HITS_FIELD_NUMBER: _ClassVar[int]
    MAX_FILTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_k: int
    max_batch: int
    max_image_bytes: int
    max_pixels: int
    max_shortlist_k: int
    max_filter_values: int
    max_request_bytes: int
    max_id_bytes: int
    max_metadata_bytes: int
    max_scans: int
    max_decode_s: float
    max_hits: int
    max_filter_bytes: int
    def __init__(self, max_k: _Optional[int] = ..., max_batch: _Optional[int] = ..., max_image_bytes: _Optional[int] = ..., max_pixels: _Optional[int] = ..., max_shortlist_k: _Optional[int] = ..., max_filter_values: _Optional[int] = ..., max_request_bytes: _Optional[int] = ..., max_id_bytes: _Optional[int] = ..., max_metadata_bytes: _Optional[int] = ..., max_scans: _Optional[int] = ..., max_decode_s: _Optional[float] = ..., max_hits: _Optional[int] = ..., max_filter_bytes: _Optional[int] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("version", "index_generation", "model_fingerprint", "dim", "dims", "num_rows", "num_shards", "plan", "placement", "limits", "has_encoder", "columns", "writable")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INDEX_GENERATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    HAS_ENCODER_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    version: str
    index_generation: str
    model_fingerprint: str
    dim: int
    dims: _containers.RepeatedScalarFieldContainer[int]
    num_rows: int
    num_shards: int
    plan: Plan
    placement: str
    limits: Limits
    has_encoder: bool
    columns: _containers.RepeatedScalarFieldContainer[str]
    writable: bool
    def __init__(self, version: _Optional[str] = ..., index_generation: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., dim: _Optional[int] = ..., dims: _Optional[_Iterable[int]] = ..., num_rows: _Optional[int] = ..., num_shards: _Optional[int] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., placement: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., has_encoder: _Optional[bool] = ..., columns: _Optional[_Iterable[str]] = ..., writable: _Optional[bool] = ...) -> None: ...

class Row(_message.Message):
    __slots__ = ("id", "vector", "image", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    id: str
    vector: bytes
    image: bytes
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, id: _Optional[str] = ..., vector: _Optional[bytes] = ..., image: _Optional[bytes] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class UpsertRequest(_message.Message):
    __slots__ = ("rows", "model_fingerprint")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[Row]
    model_fingerprint: str
    def __init__(self, rows: _Optional[_Iterable[_Union[Row, _Mapping]]] = ..., model_fingerprint: _Optional[str] = ...) -> None: ...

class UpsertResponse(_message.Message):
    __slots__ = ("write",)
    WRITE_FIELD_NUMBER: _ClassVar[int]
    write: int
    def __init__(self, write: _Optional[int] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Iterable[str]] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("write",)
    WRITE_FIELD_NUMBER: _ClassVar[int]
    write: int
    def __init__(self, write: _Optional[int] = ...) -> None: ...

class FeedbackRequest(_message.Message):
    __slots__ = ("request_id", "id", "kind")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    id: str
    kind: str
    def __init__(self, request_id: _Optional[str] = ..., id: _Optional[str] = ..., kind: _Optional[str] = ...) -> None: ...

class FeedbackResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Generation(_message.Message):
    __slots__ = ("name", "index", "plan", "encoder", "model_fingerprint", "num_rows", "includes_writes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    INCLUDES_WRITES_FIELD_NUMBER: _ClassVar[int]
    name: str
    index: str
    plan: str
    encoder: str
    model_fingerprint: str
    num_rows: int
    includes_writes: int
    def __init__(self, name: _Optional[str] = ..., index: _Optional[str] = ..., plan: _Optional[str] = ..., encoder: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., num_rows: _Optional[int] = ..., includes_writes: _Optional[int] = ...) -> None: ...

class SwitchRequest(_message.Message):
    __slots__ = ("index", "plan", "encoder", "includes_writes", "timeout_s")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    INCLUDES_WRITES_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    index: str
    plan: str
    encoder: str
    includes_writes: int
    timeout_s: int
    def __init__(self, index: _Optional[str] = ..., plan: _Optional[str] = ..., encoder: _Optional[str] = ..., includes_writes: _Optional[int] = ..., timeout_s: _Optional[int] = ...) -> None: ...

class SwitchResponse(_message.Message):
    __slots__ = ("current",)
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    current: Generation
    def __init__(self, current: _Optional[_Union[Generation, _Mapping]] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RollbackResponse(_message.Message):
    __slots__ = ("current",)
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    current: Generation
    def __init__(self, current: _Optional[_Union[Generation, _Mapping]] = ...) -> None: ...

class CompactRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: int
    def __init__(self, timeout_s: _Optional[int] = ...) -> None: ...

class CompactResponse(_message.Message):
    __slots__ = ("current",)
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    current: Generation
    def __init__(self, current: _Optional[_Union[Generation, _Mapping]] = ...) -> None: ...

class BackupRequest(_message.Message):
    __slots__ = ("path",)
    PATH_FIELD_NUMBER: _ClassVar[int]
    path: str
    def __init__(self, path: _Optional[str] = ...) -> None: ...

class BackupResponse(_message.Message):
    __slots__ = ("last_write",)
    LAST_WRITE_FIELD_NUMBER: _ClassVar[int]
    last_write: int
    def __init__(self, last_write: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("generations", "current", "previous", "last_write", "pending_rows", "followers", "recall", "activities", "compaction_failure")
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    LAST_WRITE_FIELD_NUMBER: _ClassVar[int]
    PENDING_ROWS_FIELD_NUMBER: _ClassVar[int]
    FOLLOWERS_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    ACTIVITIES_FIELD_NUMBER: _ClassVar[int]
    COMPACTION_FAILURE_FIELD_NUMBER: _ClassVar[int]
    generations: _containers.RepeatedCompositeFieldContainer[Generation]
    current: str
    previous: str
    last_write: int
    pending_rows: int
    followers: _containers.RepeatedCompositeFieldContainer[Followers]
    recall: RecallEstimate
    activities: _containers.RepeatedCompositeFieldContainer[Activity]
    compaction_failure: str
    def __init__(self, generations: _Optional[_Iterable[_Union[Generation, _Mapping]]] = ..., current: _Optional[str] = ..., previous: _Optional[str] = ..., last_write: _Optional[int] = ..., pending_rows: _Optional[int] = ..., followers: _Optional[_Iterable[_Union[Followers, _Mapping]]] = ..., recall: _Optional[_Union[RecallEstimate, _Mapping]] = ..., activities: _Optional[_Iterable[_Union[Activity, _Mapping]]] = ..., compaction_failure: _Optional[str] = ...) -> None: ...

class Activity(_message.Message):
    __slots__ = ("kind", "step", "seconds")
    KIND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    step: str
    seconds: float
    def __init__(self, kind: _Optional[str] = ..., step: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class Followers(_message.Message):
    __slots__ = ("role", "replicas", "current")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    replicas: int
    current: int
    def __init__(self, role: _Optional[str] = ..., replicas: _Optional[int] = ..., current: _Optional[int] = ...) -> None: ...

class RecallEstimate(_message.Message):
    __slots__ = ("recall", "low", "high", "queries")
    RECALL_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    recall: float
    low: float
    high: float
    queries: int
    def __init__(self, recall: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., queries: _Optional[int] = ...) -> None: ...
