"""Calibration: is the model as sure as it should be, and what would calibrating it afterwards change.

Legend: M members, B batch, Q scored positions, V outputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from opsin.callbacks.readers.base import ProbeReader, Requirement, check_count, needs_classes
from opsin.errors import ConfigError, check_number
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
from opsin.records.axes import Axes
from opsin.task import EXACT, Batch, Task
from opsin.training.module import OpsinModule
from opsin.training.objective import scored_logits
from opsin.training.observers import Observation

FITS = ("temperature", "vector", "neural_clamping")
PROBE_METRICS = ("ece", "brier", "entropy")
MemberValues = dict[str, Float[Tensor, " M"]]


class Calibration(ProbeReader):
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
        penalty: weight of the perturbation's squared 2-norm in Neural Clamping's loss, at least 0.
        clamping_steps: forward and backward passes through the model of one fit of Neural Clamping.

    Raises:
        ConfigError: a setting out of its range; when training starts, fits on a probe of one sequence, or a task that
            does not predict classes.
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
        super().__init__(every)
        check_count("Calibration.fit_every", fit_every)
        check_count("Calibration.clamping_steps", clamping_steps)
        unknown = [name for name in fit or () if name not in FITS]
        if unknown or fit == []:
            raise ConfigError("Calibration.fit", unknown[0] if unknown else [], f"any of {', '.join(FITS)}, or null")
        if focus != 0:
            check_number("Calibration.focus", focus, "0, or at least 1", 1)
        check_number("Calibration.penalty", penalty, "0 or more", 0)
        self.fit, self.fit_every = tuple(fit or ()), fit_every
        self.focus, self.penalty, self.clamping_steps = focus, penalty, clamping_steps

    def sites(self, table: SiteTable) -> list[str]:
        return ["hook_logits"]

    def requirements(self) -> list[Requirement]:
        def lacking(module: OpsinModule) -> int | None:
            return module.probe_size if self.fit and module.probe_size < 2 else None

        halves = Requirement("model.probe_size", lacking, "at least 2, to fit on one half and measure on one")
        return [needs_classes("Calibration"), halves]

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        names = [f"calibration/{name}" for name in PROBE_METRICS]
        for name in ("none", *self.fit) if self.fit else ():
            names += [f"calibration/{name}/ece", f"calibration/{name}/loss"]
        names += [f"calibration/{name}/temperature" for name in self.fit if name != "vector"]
        names += ["calibration/neural_clamping/perturbation"] if "neural_clamping" in self.fit else []
        return {name: {} for name in names}

    def task_records(self, task: Task) -> dict[str, Axes]:
        return {"calibration/exact_entropy": {}} if EXACT in task.references() else {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exact_entropy: Tensor | None = None
        super().on_fit_start(trainer, pl_module)
        if self.fit:
            self._module.listen(self.fit_every, self._fit)

    def measure(self, seen: Observation) -> None:
        batch, logits = seen.batch, scored_logits(seen.activations["hook_logits"], seen.batch)
        found = {
            "ece": expected_calibration_error(logits, batch.targets),
            "brier": brier_score(logits, batch.targets),
            "entropy": mean_entropy(logits),
        }
        if self.task_records(self._module.task):
            found["exact_entropy"] = self._exact(batch)
        self._record(found, seen.step)

    def _exact(self, batch: Batch) -> Float[Tensor, " M"]:
        """Entropy of the best predictor; equal at every step, as the probe is fixed."""
        if self._exact_entropy is None:
            known = self._module.task.exact(batch)
            assert known is not None
            self._exact_entropy = mean_entropy(known)
        return self._exact_entropy

    def _fit(self, seen: Observation) -> None:
        half = len(seen.batch.targets[0]) // 2
        fitted = seen.batch.map(lambda tensor: tensor[:, :half])
        unseen = seen.batch.map(lambda tensor: tensor[:, half:])
        with torch.no_grad():
            logits, unseen_logits = self._logits(fitted), self._logits(unseen)
        found = _quality("none", unseen_logits, unseen)
        if "temperature" in self.fit:
            heat = fit_temperature(logits, fitted.targets)
            found |= _quality("temperature", at_temperature(unseen_logits, heat), unseen)
            found |= {"temperature/temperature": heat}
        if "vector" in self.fit:
            found |= _quality("vector", fit_vector_scaling(logits, fitted.targets)(unseen_logits), unseen)
        if "neural_clamping" in self.fit:
            found |= self._clamped(fitted, unseen)
        self._record(found, seen.step)

    def _clamped(self, fitted: Batch, unseen: Batch) -> MemberValues:
        """What Neural Clamping, fitted on one half of the probe, makes of the other half."""
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
            logits = at_temperature(self._logits(unseen, found.perturbation), found.temperature)
        size = found.perturbation.flatten(1).norm(dim=1)
        fits = {f"{name}/temperature": found.temperature, f"{name}/perturbation": size}
        return _quality(name, logits, unseen) | fits

    def _no_perturbation(self, batch: Batch) -> Float[Tensor, "M 1 positions channels"]:
        table = self._module.constants.table
        if batch.features is not None:
            return table.new_zeros(len(batch.features), 1, *batch.features.shape[2:])
        width = self._module.sites.size("D")
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

    def _record(self, found: MemberValues, step: int) -> None:
        self._module.record(step, {f"calibration/{name}": values.detach() for name, values in found.items()})


def _quality(name: str, logits: Float[Tensor, "M B Q V"], batch: Batch) -> MemberValues:
    error, loss = expected_calibration_error(logits, batch.targets), mean_loss(logits, batch.targets)
    return {f"{name}/ece": error, f"{name}/loss": loss}
