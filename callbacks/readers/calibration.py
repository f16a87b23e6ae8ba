"""A read-only callback: is the model as sure as it should be, and what would calibrating it afterwards change.

Legend: M members, B batch, Q scored positions, V outputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from opsin.errors import ConfigError
from opsin.metrics.calibration import (
    at_temperature,
    brier_score,
    expected_calibration_error,
    fit_neural_clamping,
    fit_temperature,
    fit_vector_scaling,
    mean_entropy,
    mean_loss,
)
from opsin.model.sites import SiteTable
from opsin.task import Batch
from opsin.training.module import opsin_module
from opsin.training.objective import scored_logits
from opsin.training.observers import Observation

FITS = ("temperature", "vector", "neural_clamping")
KINDS = ("ece", "brier", "entropy")
Metrics = dict[str, Float[Tensor, " M"]]


class Calibration(Callback):
    """Measures how far the model's confidence is from its accuracy, and what post-hoc calibrations make of it.

    Recorded and logged on the probe's scored positions, under the interventions in force, ``[M]`` each:

    - ``calibration/ece``: expected calibration error (15 bins of equal width); ``calibration/brier``: Brier score;
      ``calibration/entropy``: mean entropy, nats; ``calibration/exact_entropy``: that of the best predictor the task
      knows, where it knows one, which a calibrated model that has learned the task has too;
    - for every FIT, fitted on the first half of the probe's sequences and measured on the others:
      ``calibration/FIT/ece`` and ``calibration/FIT/loss`` (nats) after it, and as ``calibration/none/...`` without any;
      ``calibration/FIT/temperature`` of two of them, and ``calibration/neural_clamping/perturbation``, its 2-norm.

    A calibration that changes little has become unnecessary. The definitions, with their sources, are those of
    ``opsin.metrics.calibration``. Neural Clamping adds its perturbation to every sequence's features where the task has
    them, and else to the embeddings (``hook_embed``) position by position; what interventions take from other passes is
    that of the unperturbed input.

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
        fit: post-hoc calibrations, any of ``temperature``, ``vector`` and ``neural_clamping``; none when None.
        fit_every: optimizer steps between fits; of the first and the last state there always is one.
        focus: exponent of Neural Clamping's focal loss, 0 (the negative log-likelihood) or at least 1.
        penalty: of Neural Clamping, on the squared 2-norm of the perturbation.
        clamping_steps: forward and backward passes through the model of one fit of Neural Clamping.

    Raises:
        ConfigError: a setting out of its range; when training starts, fits on a probe of one sequence.
    """

    def __init__(
        self,
        every: int = 100,
        fit: list[Literal["temperature", "vector", "neural_clamping"]] | None = None,
        fit_every: int = 1000,
        focus: float = 1.0,
        penalty: float = 0.01,
        clamping_steps: int = 100,
    ) -> None:
        for name, value in (("every", every), ("fit_every", fit_every), ("clamping_steps", clamping_steps)):
            if value < 1:
                raise ConfigError(f"Calibration.{name}", value, "at least 1")
        unknown = [name for name in fit or () if name not in FITS]
        if unknown or fit == []:
            raise ConfigError("Calibration.fit", unknown[0] if unknown else [], f"any of {', '.join(FITS)}, or null")
        if focus != 0 and not focus >= 1:
            raise ConfigError("Calibration.focus", focus, "0, or at least 1")
        if not penalty >= 0:
            raise ConfigError("Calibration.penalty", penalty, "0 or more")
        self.every, self.fit, self.fit_every = every, tuple(fit or ()), fit_every
        self.focus, self.penalty, self.clamping_steps = focus, penalty, clamping_steps
        self._knows_exact = False

    def records(self, sites: SiteTable) -> dict[str, tuple[int, ...]]:
        """Its metrics, for schedules with feedback."""
        names = [f"calibration/{kind}" for kind in KINDS]
        names += ["calibration/exact_entropy"] if self._knows_exact else []
        for name in ("none", *self.fit) if self.fit else ():
            names += [f"calibration/{name}/ece", f"calibration/{name}/loss"]
        names += [f"calibration/{name}/temperature" for name in self.fit if name != "vector"]
        names += ["calibration/neural_clamping/perturbation"] if "neural_clamping" in self.fit else []
        return dict.fromkeys(names, ())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        module = opsin_module(pl_module)
        if self.fit and module.probe_size < 2:
            raise ConfigError(
                "model.probe_size", module.probe_size, "at least 2, to fit on one half and measure on one"
            )
        self._knows_exact = module.task.exact(module.task.batch(0, 0, "eval/train", 1)) is not None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._module = opsin_module(pl_module)
        self._exact_entropy: Tensor | None = None
        self._module.listen(self.every, self._measure, ["hook_logits"])
        if self.fit:
            self._module.listen(self.fit_every, self._fit)

    def _measure(self, seen: Observation) -> None:
        batch, logits = seen.batch, scored_logits(seen.activations["hook_logits"], seen.batch)
        found = {
            "ece": expected_calibration_error(logits, batch.targets),
            "brier": brier_score(logits, batch.targets),
            "entropy": mean_entropy(logits),
        }
        if self._knows_exact:
            found["exact_entropy"] = self._exact(batch)
        self._record(found, seen.step)

    def _exact(self, batch: Batch) -> Float[Tensor, " M"]:
        """The same at every step: the probe is fixed."""
        if self._exact_entropy is None:
            known = self._module.task.exact(batch)
            assert known is not None
            self._exact_entropy = mean_entropy(known)
        return self._exact_entropy

    def _fit(self, seen: Observation) -> None:
        half = len(seen.batch.targets[0]) // 2
        fitted = seen.batch.map(lambda tensor: tensor[:, :half])
        held = seen.batch.map(lambda tensor: tensor[:, half:])
        with torch.no_grad():
            logits, unseen = self._logits(fitted), self._logits(held)
        found = _quality("none", unseen, held)
        if "temperature" in self.fit:
            heat = fit_temperature(logits, fitted.targets)
            found |= _quality("temperature", at_temperature(unseen, heat), held) | {"temperature/temperature": heat}
        if "vector" in self.fit:
            found |= _quality("vector", fit_vector_scaling(logits, fitted.targets)(unseen), held)
        if "neural_clamping" in self.fit:
            found |= self._clamped(fitted, held)
        self._record(found, seen.step)

    def _clamped(self, fitted: Batch, held: Batch) -> Metrics:
        """What Neural Clamping, fitted on some sequences, makes of others."""
        name, zeros = "neural_clamping", self._no_perturbation(fitted)
        found = fit_neural_clamping(
            lambda delta: self._logits(fitted, delta),
            zeros,
            fitted.targets,
            self.focus,
            self.penalty,
            self.clamping_steps,
        )
        with torch.no_grad():
            logits = at_temperature(self._logits(held, found.perturbation), found.temperature)
        size = found.perturbation.flatten(1).norm(dim=1)
        fits = {f"{name}/temperature": found.temperature, f"{name}/perturbation": size}
        return _quality(name, logits, held) | fits

    def _no_perturbation(self, batch: Batch) -> Float[Tensor, "M 1 positions channels"]:
        table = self._module.constants.table
        if batch.features is not None:
            return table.new_zeros(len(batch.features), 1, *batch.features.shape[2:])
        width = self._module.transformer.width
        return table.new_zeros(len(batch.tokens), 1, batch.layout.positions, width)

    def _logits(self, batch: Batch, perturbation: Tensor | None = None) -> Float[Tensor, "M B Q V"]:
        """Scored logits under the interventions in force, of an input that something may be added to."""
        passes = self._module.forward_passes
        tap, shown = passes.tap(batch), batch
        if perturbation is not None and batch.features is not None:
            shown = replace(batch, features=batch.features + perturbation)

        def perturbing(name: str, activation: Tensor) -> Tensor:
            if name == "hook_embed" and perturbation is not None and batch.features is None:
                activation = activation + perturbation
            return tap(name, activation)

        return passes.logits(shown, perturbing)

    def _record(self, found: Metrics, step: int) -> None:
        self._module.record(step, {f"calibration/{name}": values.detach() for name, values in found.items()})


def _quality(name: str, logits: Float[Tensor, "M B Q V"], batch: Batch) -> Metrics:
    error, loss = expected_calibration_error(logits, batch.targets), mean_loss(logits, batch.targets)
    return {f"{name}/ece": error, f"{name}/loss": loss}
