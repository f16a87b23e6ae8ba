"""Weights & Biases: what a run and a population send there. ``callback.py`` is what a user attaches."""

from opsin.callbacks.wandb.callback import WeightsAndBiases as WeightsAndBiases
