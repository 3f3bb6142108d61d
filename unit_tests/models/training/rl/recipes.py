"""Recipes small enough for tests."""

from dataclasses import replace
from pathlib import Path

from models.training.rl.recipe import Actor, Buffer, Mtp, Optimizer, Recipe, TrainerBase
from unit_tests.models.training.mtp_checks import checkpoint

RECIPES = Path(__file__).resolve().parents[4] / "models" / "training" / "rl" / "recipes"


def tiny_recipe(dtype: str = "float32", trainable: tuple[str, ...] = (), **changes: object) -> Recipe:
    """Two prompts, four samples each, on the smallest checkpoint; `changes` of strategies, max_staleness, steps, rate
    and mtp_rate."""
    recipe, steps = Recipe(), int(str(changes.get("steps", 3)))
    actor = Actor(optimizer=Optimizer(lr=float(str(changes.get("rate", 3e-3)))), trainable=trainable)
    mtp = Mtp(optimizer=Optimizer(lr=float(str(changes.get("mtp_rate", 1e-3)))))
    staleness = int(str(changes.get("max_staleness", 0)))
    return replace(
        recipe,
        experiment=replace(
            recipe.experiment,
            model_path=str(checkpoint(dtype)),
            weight_transfer_strategies=str(changes.get("strategies", "full")),  # type: ignore[arg-type]
        ),
        rollout=replace(recipe.rollout, gconfig=replace(recipe.rollout.gconfig, n_samples=4, max_new_tokens=6)),
        dataflow=replace(recipe.dataflow, buffer=Buffer(staleness)),
        trainer_base=TrainerBase(total_train_steps=steps, train_batch_size=2, actor=actor, mtp=mtp),
    )
