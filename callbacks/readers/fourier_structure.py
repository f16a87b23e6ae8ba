"""FourierStructure: how far a model that learns an operation modulo p has come to compute it by frequencies.

Legend: M members, B pairs (a, b) of the table, P = p numbers modulo p, F = (p - 1) / 2 frequencies, L positions,
D width, N neurons.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Int64
from lightning.pytorch import LightningModule, Trainer
from numpy import ndarray
from PIL.Image import Image
from torch import Tensor

from opsin.callbacks.readers.base import ProbeReader, Requirement, check_count
from opsin.callbacks.readers.run_folder import run_folder
from opsin.errors import ConfigError
from opsin.figures.fourier import fourier_figure
from opsin.figures.style import PICTURED_MEMBERS, as_image, save_figure
from opsin.metrics.fourier import (
    excluded,
    gini,
    neuron_concentration,
    power_by_frequency,
    restricted,
    share_in,
    share_of_logits,
    strongest_frequencies,
    trig_coefficients,
)
from opsin.model.sites import SiteTable
from opsin.records.axes import Axes
from opsin.task import Bank, Batch, Task
from opsin.training.module import OpsinModule
from opsin.training.objective import scored_logits
from opsin.training.observers import Observation

EMBEDDING, LOGITS = "hook_embed", "hook_logits"


@runtime_checkable
class PairTable(Protocol):
    """A task whose examples are the pairs (a, b) of the numbers modulo p, with a at the first position.

    Attributes:
        modulus: p, how many numbers there are.
    """

    modulus: int

    def table(self, bank: Bank) -> Batch:
        """All pairs as the batch of one member, in the order of a, then b; answers are the last targets."""

    def examples_of(self, split: str) -> Int64[ndarray, " n"]:
        """Numbers a p + b of a split's pairs."""


class FourierStructure(ProbeReader):
    """Measures on the whole table how much of embedding, neurons and logits is of a few frequencies of a + b.

    Nanda et al. 2023, "Progress measures for grokking via mechanistic interpretability"; definitions in
    ``opsin.metrics.fourier``. *Key frequencies* are those with the most power in the embedding at that step. Read-only,
    under the interventions in force. Recorded and logged, ``[M]`` each, as ``fourier/...``:

    - ``gini`` of the embedding's power by frequency, and ``key_share``, the share that key frequencies have of it;
    - ``neuron_share``: mean over live neurons of the last MLP of the largest share of their variance in one frequency;
    - ``logit_share``: share of the logits' variance that cos w(answer - c) explain;
    - ``restricted_loss``: cross-entropy (nats) on all pairs of logits with key frequencies alone;
    - ``excluded_loss``: cross-entropy (nats) on the training pairs of logits without them.

    With the axis ``frequency``, whose index k - 1 is that of frequency k, ``[M, F]`` each:

    - ``power``: share of the embedding's power in each frequency;
    - ``coefficient``: inner product of the logits with cos w(answer - c), of length 1;
    - ``loss_without``: cross-entropy (nats) on the training pairs of logits without this frequency alone.

    The run folder receives ``fourier.png``, which W&B shows while training. The module's summary receives under
    ``fourier`` the final ``key_frequencies``, strongest first, for several members as a list.

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
        key_frequencies: number of key frequencies.

    Raises:
        ConfigError: a number out of its range or, when training starts, a task that is no whole table modulo an odd p
            in which each answer is as frequent.
    """

    name = "fourier"

    def __init__(self, every: int = 50, key_frequencies: int = 5) -> None:
        super().__init__(every)
        self.key_frequencies = check_count("FourierStructure.key_frequencies", key_frequencies)

    def sites(self, table: SiteTable) -> list[str]:
        return [EMBEDDING, *self._neurons(table), LOGITS]

    def _neurons(self, table: SiteTable) -> list[str]:
        """Neurons of the last MLP; none where there is none."""
        return [site.name for site in table if site.name.endswith("mlp.hook_post") and "L" in site.axes][-1:]

    def requirements(self) -> list[Requirement]:
        def lacking(module: OpsinModule) -> str | None:
            return None if _is_balanced(module.task) else type(module.task).__name__

        return [Requirement("FourierStructure", lacking, "a whole table modulo an odd number, each answer as frequent")]

    def check(self, module: OpsinModule) -> None:
        most = module.task.modulus // 2  # type: ignore[attr-defined]
        if self.key_frequencies > most:
            raise ConfigError("FourierStructure.key_frequencies", self.key_frequencies, f"at most {most} of them")

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        neurons = ["neuron_share"] if self._neurons(sites) else []
        numbers = ["gini", "key_share", *neurons, "logit_share", "restricted_loss", "excluded_loss"]
        return {f"{self.name}/{number}": {} for number in numbers}

    def task_records(self, task: Task) -> dict[str, Axes]:
        if not isinstance(task, PairTable):
            return {}
        axes = {"frequency": task.modulus // 2}
        return {f"{self.name}/{number}": axes for number in ("power", "coefficient", "loss_without")}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # it looks at the table, not at the probe
        self._module.listen(self.every, self.measure)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, task = self._module, self._module.task
        # what requirements have found
        assert isinstance(task, PairTable)
        self._table = task.table(module.constants.bank).shared_by(module.n_members)
        self._modulus, self._answers = task.modulus, self._table.targets[0, :, -1]
        self._trained = torch.from_numpy(task.examples_of("train")).to(module.device)

    def measure(self, seen: Observation) -> None:
        activations = self._module.observe(self._table, self.sites(self._module.sites))
        logits = scored_logits(activations[LOGITS], self._table)[:, :, -1, : self._modulus].double()
        power = self._power(activations[EMBEDDING])
        key = strongest_frequencies(power, self.key_frequencies)
        numbers = {"gini": gini(power), "key_share": share_in(power, key), "power": power / power.sum(1, keepdim=True)}
        for site in self._neurons(self._module.sites):
            numbers["neuron_share"] = self._concentration(activations[site][:, :, -1])
        numbers |= self._of_logits(logits, key)
        self._module.record(seen.step, {f"{self.name}/{number}": values for number, values in numbers.items()})

    def _power(self, embedding: Float[Tensor, "M B L D"]) -> Float[Tensor, "M F"]:
        # a stands first, and every p-th pair has another a
        return power_by_frequency(embedding[:, :: self._modulus, 0].double())

    def _concentration(self, activation: Float[Tensor, "M B N"]) -> Float[Tensor, " M"]:
        pairs = (self._modulus, self._modulus)
        return neuron_concentration(activation.double().unflatten(1, pairs)).nanmean(1)

    def _of_logits(self, logits: Float[Tensor, "M B P"], key: Bool[Tensor, "M F"]) -> dict[str, Tensor]:
        answers, trained = self._answers, self._trained
        coefficients = trig_coefficients(logits, answers)

        def excluding(chosen: Bool[Tensor, "M F"]) -> Float[Tensor, " M"]:
            return _loss_on_pairs(excluded(logits, answers, chosen)[:, trained], answers[trained])

        alone = torch.eye(key.shape[1], dtype=torch.bool, device=key.device)[:, None].expand(-1, len(key), -1)
        return {
            "coefficient": coefficients,
            "logit_share": share_of_logits(coefficients, logits),
            "restricted_loss": _loss_on_pairs(restricted(logits, answers, key), answers),
            "excluded_loss": excluding(key),
            "loss_without": torch.stack([excluding(chosen) for chosen in alone], 1),
        }

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = self._module
        # the last state has been measured
        power = torch.from_numpy(module.history[f"{self.name}/power"].values[-1])
        order = power.argsort(1, descending=True)[:, : self.key_frequencies] + 1
        rows = [{"key_frequencies": row} for row in order.tolist()]
        self.summarise(self.name, rows)
        drawn = fourier_figure(
            module.history, range(min(module.n_members, PICTURED_MEMBERS)), named=module.n_members > 1
        )
        save_figure(drawn, run_folder(trainer) / f"{self.name}.png")

    def picture(self, member: int) -> Image | None:
        """One member's figure; None before anything is measured."""
        history = self._module.history
        return as_image(fourier_figure(history, [member], named=False)) if f"{self.name}/gini" in history else None


def _is_balanced(task: Task) -> bool:
    """Whether a task is a whole table modulo an odd number with each answer as often as any other."""
    if not isinstance(task, PairTable) or task.modulus < 3 or task.modulus % 2 == 0:
        return False
    answers = task.table(task.bank()).targets[0, :, -1]
    return bool((answers.bincount(minlength=task.modulus) == task.modulus).all())


def _loss_on_pairs(logits: Float[Tensor, "M B P"], answers: Int[Tensor, " B"]) -> Float[Tensor, " M"]:
    """Mean cross-entropy (nats) over pairs."""
    right = answers.expand(len(logits), -1)[..., None]
    return -logits.log_softmax(-1).gather(-1, right).mean((1, 2))
