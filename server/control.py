"""What is asked of a running engine beside requests: pauses, weight updates, versions, memory.

Plain dataclasses like those of `messages.py`, and sent the same way. Each command gets one `Done` with its id. Knows
names, shapes and places of weights, never their values' meaning. No torch.
"""

from dataclasses import dataclass, field
from typing import Any

# What becomes of the requests in flight: they end with what they have; end by themselves; go back to the queue and are
# computed anew; stay where they are, with the cache of the weights before.
PAUSE_MODES = ("abort", "wait", "retract", "keep")
MEMORY_TAGS = ("weights", "kv_cache", "cuda_graph")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an update, by checkpoint name: `dtype` as torch spells it ("bfloat16"), and the SHA-256 of its
    bytes, row-major and little-endian; empty: not told."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str = ""


@dataclass(frozen=True)
class WeightSource:
    """Where the tensors of an update are.

    `kind` disk: safetensors in directory or file `path` (which may lie in shared memory); stream: a publisher at `url`,
    read over `num_streams` connections, which sends what it can of the `strategies`; group: broadcasts of `tensors`, in
    this order, from rank 0 of the group `group`; inline: safetensors files in `data`.
    """

    kind: str
    path: str = ""
    url: str = ""
    num_streams: int = 4
    strategies: tuple[str, ...] = ("full", "delta")
    group: str = ""
    tensors: tuple[TensorSpec, ...] = ()
    data: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Pause:
    """Stop making tokens; `mode` is one of PAUSE_MODES. Requests that come meanwhile wait."""

    control_id: str
    mode: str = "abort"


@dataclass(frozen=True)
class Resume:
    """Go on."""

    control_id: str


@dataclass(frozen=True)
class BeginUpdate:
    """Open a weight session. Nothing that serves changes before it is committed.

    `tensors`, if there are any, are all that will come. An update that `is_partial` may leave tensors out; one that
    `is_delta` overwrites parts of the weights of `base_version`, which must be the ones that serve. With `needs_mtp` an
    update of the target alone is refused where a draft head is loaded. `result_sha256`, if given, is what the checksum
    of all the server's tensors must be after it; one that is served in fewer bits than it comes in counts as it came.
    """

    control_id: str
    tensors: tuple[TensorSpec, ...] = ()
    is_partial: bool = False
    is_delta: bool = False
    base_version: str | None = None
    needs_mtp: bool = False
    result_sha256: str = ""


@dataclass(frozen=True)
class AddTensors:
    """Bring tensors of the open session to the engine; an error closes the session, and the old weights serve on. A
    group that still owes it tensors is left."""

    control_id: str
    source: WeightSource


@dataclass(frozen=True)
class CommitUpdate:
    """Between two steps, make the session's weights those that serve, as `weight_version` (None: counted on).

    `in_flight`, one of PAUSE_MODES, says what becomes of requests that run.
    """

    control_id: str
    weight_version: str | None = None
    in_flight: str = "keep"


@dataclass(frozen=True)
class RollBackUpdate:
    """Close the session; the old weights serve on. A group that still owes it tensors is left."""

    control_id: str


@dataclass(frozen=True)
class UpdateWeights:
    """A whole session in one command: begin, add the source, commit. A stream says itself what it brings: `begin` is
    then what the publisher declares."""

    control_id: str
    source: WeightSource
    begin: BeginUpdate
    commit: CommitUpdate


@dataclass(frozen=True)
class JoinGroup:
    """Join a process group for broadcasts: `rank` of `world_size`, the store of rank 0 at `address`:`port`."""

    control_id: str
    group: str
    address: str
    port: int
    rank: int
    world_size: int
    backend: str


@dataclass(frozen=True)
class LeaveGroup:
    """Leave a process group, or call a join off that has not all its members yet."""

    control_id: str
    group: str


@dataclass(frozen=True)
class SetVersion:
    """Name the weights that serve."""

    control_id: str
    weight_version: str


@dataclass(frozen=True)
class ReadWeights:
    """Values of one tensor by checkpoint name: at most `num_values` of its beginning, row by row."""

    control_id: str
    name: str
    num_values: int = 100


@dataclass(frozen=True)
class CheckWeights:
    """`action` checksum: SHA-256 of each tensor that serves (as dtype of the last load) and of them all; snapshot:
    remember these; compare: name those that differ from the snapshot; reset: fill all weights with random numbers."""

    control_id: str
    action: str = "checksum"


@dataclass(frozen=True)
class FlushCache:
    """Forget every computed prefix. Fails while requests run, after `timeout` seconds of waiting for them."""

    control_id: str
    timeout: float = 0.0


@dataclass(frozen=True)
class ReleaseMemory:
    """Give the memory of `tags` (of MEMORY_TAGS) back; needs an engine without requests. Weights are kept in host
    memory, or with `discards_weights` not at all."""

    control_id: str
    tags: tuple[str, ...] = MEMORY_TAGS
    discards_weights: bool = False


@dataclass(frozen=True)
class RestoreMemory:
    """Take the memory of those of `tags` again that are released."""

    control_id: str
    tags: tuple[str, ...] = MEMORY_TAGS


@dataclass(frozen=True)
class Done:
    """engine -> api: a command has been carried out, or refused with `error`, of which `kind` is the class name in
    `errors.py`.

    `values` is what it gave. Pause: num_requests, those in flight that it met; UpdateWeights, CommitUpdate: mode (full
    or delta), num_bytes, commit_seconds, mtp_weight_version, mtp_stale; ReadWeights: values (a flat list), dtype and
    shape; CheckWeights: checksum (of them all) and checksums (by name) for checksum and snapshot, different (a list of
    names) for compare.
    """

    control_id: str
    values: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    kind: str = ""


Control = (
    Pause
    | Resume
    | BeginUpdate
    | AddTensors
    | CommitUpdate
    | RollBackUpdate
    | UpdateWeights
    | JoinGroup
    | LeaveGroup
    | SetVersion
    | ReadWeights
    | CheckWeights
    | FlushCache
    | ReleaseMemory
    | RestoreMemory
)
