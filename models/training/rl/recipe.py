"""What an RL run is made of, as YAML: nested sections with the field names that trainers share. Frozen dataclasses.

Every field has a default; an unknown one is refused by its name and the nearest known one.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from models.training.mtp_settings import TrainingError
from models.training.rl.rewards import REWARDS

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # 5e-6 is a text to YAML 1.1, and a number to all who write it
DEMO = Path(__file__).resolve().parents[2] / "demo"


@dataclass(frozen=True)
class Experiment:
    """What is trained, and how its weights travel.

    Attributes:
        experiment_name: of the run, for its log.
        trial_name: of one of several runs with the same settings.
        model_path: Hugging Face directory of the checkpoint; empty: the bundled demo.
        seed: of prompts and samples.
        weight_transfer_mode: tcp, the one there is.
        weight_transfer_strategies: full, or delta: only what has changed, where that is less.
    """

    experiment_name: str = "rl"
    trial_name: str = "0"
    model_path: str = ""
    seed: int = 0
    weight_transfer_mode: Literal["tcp"] = "tcp"
    weight_transfer_strategies: Literal["full", "delta"] = "full"

    @property
    def directory(self) -> Path:
        """Of the checkpoint."""
        return Path(self.model_path) if self.model_path else DEMO


@dataclass(frozen=True)
class GenerationConfig:
    """How samples are drawn. Log-probabilities are those of the model itself, so the temperature must be 1.

    Attributes:
        n_samples: per prompt; their rewards are compared with each other.
        temperature: 1.
        max_new_tokens: length of a sample.
        ignore_eos: whether all samples have that length.
    """

    n_samples: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 16
    ignore_eos: bool = False


@dataclass(frozen=True)
class Rollout:
    """How samples are asked for.

    Attributes:
        gconfig: how they are drawn.
        max_concurrent_rollouts: prompts that are asked for at the same time.
        num_streams: connections of a weight transfer.
    """

    gconfig: GenerationConfig = GenerationConfig()
    max_concurrent_rollouts: int = 16
    num_streams: int = 4


@dataclass(frozen=True)
class Buffer:
    """Samples on their way to a training step.

    Attributes:
        max_staleness: versions that a sample's first weights may be older than those that are trained. 0: every step
            waits for samples of its own weights; more: the next samples are drawn while a step is made.
    """

    max_staleness: int = 0


@dataclass(frozen=True)
class Workflow:
    """Prompts and rewards.

    Attributes:
        workflow_cls: rlvr, the one there is: prompts of random tokens, and a reward that a program computes.
        reward_fn: a name in REWARDS.
        prompt_len: tokens of a prompt.
    """

    workflow_cls: Literal["rlvr"] = "rlvr"
    reward_fn: str = "digit_share"
    prompt_len: int = 4


@dataclass(frozen=True)
class Dataflow:
    """What stands between rollouts and training.

    Attributes:
        delta_full_sync_interval: every so many versions the weights travel whole; 0: only when they must.
        buffer: samples on their way.
        workflow_spec: prompts and rewards.
    """

    delta_full_sync_interval: int = 10
    buffer: Buffer = Buffer()
    workflow_spec: Workflow = Workflow()


@dataclass(frozen=True)
class Optimizer:
    """AdamW in float32.

    Attributes:
        lr: learning rate.
        weight_decay: decoupled.
        gradient_clipping: the norm that gradients are scaled down to.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    gradient_clipping: float = 1.0


@dataclass(frozen=True)
class Actor:
    """The policy's training.

    Attributes:
        optimizer: of the policy.
        trainable: beginnings of the checkpoint names of what is trained; none: all of the policy.
        eps_clip: how far the ratio to the weights that drew a sample may move before its gradient stops.
    """

    optimizer: Optimizer = Optimizer()
    trainable: tuple[str, ...] = ()
    eps_clip: float = 0.2


@dataclass(frozen=True)
class Mtp:
    """The draft head's training, which gives the policy no gradient.

    Attributes:
        enabled: whether it is trained along; else it stays as it is.
        mtp_depth: how many tokens ahead it learns to guess.
        optimizer: of the head.
    """

    enabled: bool = True
    mtp_depth: int = 1
    optimizer: Optimizer = Optimizer()


@dataclass(frozen=True)
class TrainerBase:
    """Training steps.

    Attributes:
        total_train_steps: how many.
        train_batch_size: prompts per step.
        actor: the policy.
        mtp: the draft head.
    """

    total_train_steps: int = 20
    train_batch_size: int = 8
    actor: Actor = Actor()
    mtp: Mtp = Mtp()


@dataclass(frozen=True)
class Engine:
    """The rollout server's settings; None leaves one to the server.

    Attributes:
        backend: tandem.
        dtype: of the weights as served; float32 makes the trainer's log-probabilities the server's.
        mtp_step: drafts per step.
        max_running_requests: more wait.
        mem_fraction_static: share of the memory for weights and caches.
        attention_backend: of the server.
    """

    backend: Literal["tandem"] = "tandem"
    dtype: str = "float32"
    mtp_step: int = 3
    max_running_requests: int | None = None
    mem_fraction_static: float | None = None
    attention_backend: str | None = None


@dataclass(frozen=True)
class Recipe:
    """All of a run. Raises TrainingError for values outside their range."""

    experiment: Experiment = Experiment()
    rollout: Rollout = Rollout()
    dataflow: Dataflow = Dataflow()
    trainer_base: TrainerBase = field(default_factory=TrainerBase)
    engine: Engine = Engine()

    def __post_init__(self) -> None:
        generation, trainer = self.rollout.gconfig, self.trainer_base
        least = {
            "rollout.gconfig.n_samples": (generation.n_samples, 2),
            "rollout.gconfig.max_new_tokens": (generation.max_new_tokens, 2),
            "rollout.max_concurrent_rollouts": (self.rollout.max_concurrent_rollouts, 1),
            "rollout.num_streams": (self.rollout.num_streams, 1),
            "dataflow.delta_full_sync_interval": (self.dataflow.delta_full_sync_interval, 0),
            "dataflow.buffer.max_staleness": (self.dataflow.buffer.max_staleness, 0),
            "dataflow.workflow_spec.prompt_len": (self.dataflow.workflow_spec.prompt_len, 1),
            "trainer_base.total_train_steps": (trainer.total_train_steps, 1),
            "trainer_base.train_batch_size": (trainer.train_batch_size, 1),
            "trainer_base.mtp.mtp_depth": (trainer.mtp.mtp_depth, 1),
        }
        for name, (value, limit) in least.items():
            if value < limit:
                raise TrainingError(f"{name} is {value}, at least {limit} is needed")
        if generation.temperature != 1.0:
            raise TrainingError(
                f"rollout.gconfig.temperature is {generation.temperature}, 1 is needed: log-probabilities are those "
                "before temperature"
            )
        if (name := self.dataflow.workflow_spec.reward_fn) not in REWARDS:
            raise TrainingError(f"dataflow.workflow_spec.reward_fn is {name!r}, one of {', '.join(REWARDS)} is needed")

    def server_arguments(self) -> list[str]:
        """For the command line of `python -m server`."""
        given = {name: value for name, value in vars(self.engine).items() if name != "backend" and value is not None}
        settings = {"model": self.experiment.directory, **given}
        return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]

    @property
    def strategies(self) -> tuple[str, ...]:
        """Of weight transfers."""
        return ("full", "delta") if self.experiment.weight_transfer_strategies == "delta" else ("full",)


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file with `changes`, SECTION.FIELD=VALUE each. Raises TrainingError naming file, field."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content = {} if content is None else content
        for change in changes if isinstance(content, dict) else ():
            _change(content, change)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingError(f"{path} is not readable YAML: {error}") from None
    try:
        return read_section(Recipe, content, "")
    except TrainingError as error:
        raise TrainingError(f"{path}: {error}") from None


def read_section(kind: type, values: Any, place: str) -> Any:
    """A dataclass from a mapping, section by section. Raises TrainingError for unknown names and for other types."""
    if not isinstance(values, Mapping):
        raise TrainingError(f"{place or 'the recipe'} is {values!r}, a section with fields is needed")
    hints = get_type_hints(kind)
    known = {one.name for one in fields(kind)}
    read = {}
    for name, value in values.items():
        if name not in known:
            raise TrainingError(f"unknown field {_join(place, name)}{_suggest(str(name), known)}")
        read[name] = _read_value(hints[name], value, _join(place, name))
    return kind(**read)


def _change(content: dict[str, Any], change: str) -> None:
    """Put one SECTION.FIELD=VALUE in its place. Raises TrainingError for another form, YAMLError for the value."""
    place, sign, value = change.partition("=")
    *sections, name = place.split(".")
    section: Any = content
    for one in sections:
        section = section.setdefault(one, {})
        if not isinstance(section, dict):
            raise TrainingError(f"{change!r}: {one} is no section of the recipe")
    if not sign or not name:
        raise TrainingError(f"{change!r} is no SECTION.FIELD=VALUE")
    section[name] = yaml.safe_load(value)


def _read_value(hint: Any, value: Any, place: str) -> Any:
    if is_dataclass(hint):
        return read_section(hint, value, place)  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise TrainingError(f"{place} is {value!r}, one of {', '.join(get_args(hint))} is needed")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise TrainingError(f"{place} is {value!r}, a list of texts is needed")
        return tuple(value)
    kinds = get_args(hint) or (hint,)
    if float in kinds and (type(value) is int or (isinstance(value, str) and _EXPONENT.fullmatch(value))):
        return float(value)
    if type(value) not in kinds:
        needed = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise TrainingError(f"{place} is {value!r}, {needed} is needed")
    return value


def _join(place: str, name: object) -> str:
    return f"{place}.{name}" if place else str(name)


def _suggest(name: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
    return f"; the nearest known one is {nearest[0]}; all: {', '.join(sorted(known))}"
