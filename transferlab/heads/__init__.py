"""Parallel heads: K trainings that differ in numbers only, as one program; for grids, folds, seeds and sites.

    trained = train_heads(method, weights, task, recipe, [Head(lr, 0.0) for lr in (1e-3, 1e-2, 1e-1)])
    trained.scores[1][""].accuracy

Each head ends where `train.fit` would end with its learning rate, weight decay, seed and options, to rounding. What the
others do does not matter to it, not to a single bit at equal K. K is cut into chunks that fit the memory.
"""
from transferlab.heads.price import step_cost
from transferlab.heads.program import Head
from transferlab.heads.scores import Score, Trained
from transferlab.heads.training import train_heads

__all__ = ["Head", "Score", "Trained", "step_cost", "train_heads"]
