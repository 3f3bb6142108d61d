"""The loop: samples from a rollout server, a step on them, the new weights to the server, and so on.

Without staleness allowed, all of it follows from the recipe: the same tokens, the same weights to the bit.
"""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from models.training.__main__ import read_tokenizer
from models.training.mtp_loss import compute_mtp_loss
from models.training.mtp_settings import MTPSettings, TrainingError
from models.training.publisher import Publisher
from models.training.rl.grpo import Batch, compute_policy_loss, make_batch
from models.training.rl.policy import Policy
from models.training.rl.recipe import Recipe
from models.training.rl.rewards import Reward, prompt_tokens
from models.training.rollout_server import Rollout

Groups = list[list[Rollout]]

# Else the server takes the checkpoint's defaults, and draws from another law than the one that is trained.
_WHOLE_LAW = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


class Server(Protocol):
    """What the loop needs of a rollout server."""

    def generate(self, prompt_ids: list[int], sampling: dict[str, Any], n: int, seed: int) -> list[Rollout]:
        """n samples of a prompt."""

    def pull_weights(self, publisher_url: str, num_streams: int) -> dict[str, Any]:
        """Fetch the newest version."""


@dataclass(frozen=True)
class StepReport:
    """What one training step did.

    Attributes:
        step: from 1 on; its weights are the version of that name.
        reward: mean over the samples that were trained on.
        transfer: how the new weights travelled, full or delta.
        num_samples: that were trained on.
        num_dropped: that were too old, or had not come to an end.
        logprob_gap: largest difference between the server's and our log-probabilities.
        mtp_loss: the head's; None where it is not trained.
        mtp_accept_rate: share of sampled tokens that are the head's first guess; None where it is not trained.
        rollout_seconds: waited for samples.
        train_seconds: of the step itself.
        transfer_seconds: until the server had the weights.
    """

    step: int
    reward: float
    transfer: str
    num_samples: int
    num_dropped: int
    logprob_gap: float
    mtp_loss: float | None
    mtp_accept_rate: float | None
    rollout_seconds: float
    train_seconds: float
    transfer_seconds: float


class RLLoop:
    """A recipe at work with one server. Versions are named by the step that made them; 0 is the checkpoint."""

    def __init__(self, recipe: Recipe, server: Server, publisher: Publisher):
        self.recipe, self.server, self.publisher = recipe, server, publisher
        directory, trainer = recipe.experiment.directory, recipe.trainer_base
        tokenizer = read_tokenizer(directory)
        self.reward = Reward(recipe.dataflow.workflow_spec.reward_fn, tokenizer)
        self.tokens = prompt_tokens(tokenizer)
        self.policy = Policy(directory, trainer.actor, trainer.mtp)
        self.mtp_loss = MTPSettings(
            enabled=trainer.mtp.enabled, mtp_depth=trainer.mtp.mtp_depth, mtp_loss_scaling_factor=1.0
        )

    def run(self, report: Callable[[StepReport], None]) -> list[StepReport]:
        """All steps. Raises TrainingError."""
        reports: list[StepReport] = []
        total = self.recipe.trainer_base.total_train_steps
        is_ahead = self.recipe.dataflow.buffer.max_staleness > 0
        self._publish(0)
        with ThreadPoolExecutor(1) as ahead:
            waiting: Future[Groups] = ahead.submit(self.collect, 1)
            for step in range(1, total + 1):
                start = time.perf_counter()
                groups = waiting.result()
                seconds = time.perf_counter() - start
                if is_ahead and step < total:
                    waiting = ahead.submit(self.collect, step + 1)
                reports.append(self.make_step(step, groups, seconds))
                report(reports[-1])
                if not is_ahead and step < total:
                    waiting = ahead.submit(self.collect, step + 1)
        return reports

    def collect(self, step: int) -> Groups:
        """The samples of a step's prompts; both follow from the seed and the step."""
        generation, rollout = self.recipe.rollout.gconfig, self.recipe.rollout
        rng = random.Random(f"{self.recipe.experiment.seed} {step}")
        sampling = {
            "temperature": generation.temperature,
            **_WHOLE_LAW,
            "max_new_tokens": generation.max_new_tokens,
            "ignore_eos": generation.ignore_eos,
        }
        length = self.recipe.dataflow.workflow_spec.prompt_len
        orders = [
            (rng.choices(self.tokens, k=length), rng.randrange(2**31))
            for _ in range(self.recipe.trainer_base.train_batch_size)
        ]
        with ThreadPoolExecutor(rollout.max_concurrent_rollouts) as pool:
            return list(
                pool.map(lambda order: self.server.generate(order[0], sampling, generation.n_samples, order[1]), orders)
            )

    def make_step(self, step: int, groups: Groups, rollout_seconds: float) -> StepReport:
        """Train on samples, and bring the new weights to the server."""
        kept = [[one for one in group if self._is_usable(one, step)] for group in groups]
        kept = [group for group in kept if len(group) > 1]  # a sample alone has nothing to be compared with
        num_samples, num_drawn = sum(map(len, kept)), sum(map(len, groups))
        if not kept:
            raise TrainingError(
                f"none of the {num_drawn} samples of step {step} can be trained on: they were aborted, or are older "
                f"than dataflow.buffer.max_staleness {self.recipe.dataflow.buffer.max_staleness} allows"
            )
        rewards = [[self.reward(rollout.output_ids) for rollout in group] for group in kept]
        start = time.perf_counter()
        found = self._train(make_batch(kept, rewards))
        trained = time.perf_counter()
        mode = self._publish(step)
        return StepReport(
            step=step,
            reward=sum(map(sum, rewards)) / num_samples,
            transfer=mode,
            num_samples=num_samples,
            num_dropped=num_drawn - num_samples,
            rollout_seconds=rollout_seconds,
            train_seconds=trained - start,
            transfer_seconds=time.perf_counter() - trained,
            **found,
        )

    def _is_usable(self, rollout: Rollout, step: int) -> bool:
        if rollout.finish_reason not in ("stop", "length") or not rollout.versions:
            return False
        oldest = rollout.oldest_version
        age = step - 1 - int(oldest) if oldest.isdigit() else step
        return age <= self.recipe.dataflow.buffer.max_staleness

    def _train(self, batch: Batch) -> dict[str, Any]:
        policy, trainer = self.policy, self.recipe.trainer_base
        hidden = policy.target.forward_sequence(batch.token_ids)
        found = compute_policy_loss(policy.target, hidden, batch, trainer.actor.eps_clip)
        loss, told = found.loss, dict[str, float | None](mtp_loss=None, mtp_accept_rate=None)
        if trainer.mtp.enabled:
            head = compute_mtp_loss(policy.head, batch.token_ids, hidden, batch.labels, self.mtp_loss)
            loss = loss + head.mtp_loss
            told = {"mtp_loss": float(head.mtp_loss.detach()), "mtp_accept_rate": float(head.mtp_accept_rate[0])}
        loss.backward()
        policy.step()
        return {"logprob_gap": found.logprob_gap, **told}

    def _publish(self, step: int) -> str:
        """Bring the policy to the server as the version of that step: how it travelled."""
        version = self.publisher.publish(self.policy.tensors, str(step))
        self.server.pull_weights(self.publisher.url, self.recipe.rollout.num_streams)
        if not self.publisher.modes:
            raise TrainingError(f"the server did not fetch version {version.name}: it pulls from {self.publisher.url}")
        return self.publisher.modes[-1]


def rise(reports: list[StepReport]) -> tuple[float, float]:
    """The mean reward of the first fifth of the steps, and of the last one."""
    count = max(1, len(reports) // 5)
    rewards = [report.reward for report in reports]
    return sum(rewards[:count]) / count, sum(rewards[-count:]) / count


def iterate_fields(report: StepReport) -> Iterator[tuple[str, Any]]:
    """(name, value) for a log, rounded."""
    for name, value in vars(report).items():
        yield name, round(value, 6) if isinstance(value, float) else value
