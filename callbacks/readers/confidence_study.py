"""The case study of confidence at the end of a run: neurons on sequences that repeat themselves, and without them.

Legend: M members, N neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor

from opsin.callbacks.readers.base import Reader, Requirement, check_count, needs_evaluation_set
from opsin.callbacks.readers.last_layer import (
    effects_and_control,
    last_layer_sites,
    needs_read_out,
    read_out_and_outputs,
)
from opsin.callbacks.readers.run_folder import run_folder
from opsin.errors import ConfigError
from opsin.figures.confidence import confidence_figure
from opsin.figures.style import PICTURED_MEMBERS, as_image
from opsin.metrics.confidence import Change, Compared, Study, change, strongest, token_entropy
from opsin.metrics.mean_ablation import Effect, candidates
from opsin.metrics.neuron_weights import ReadOut
from opsin.model.sites import SiteTable
from opsin.records.axes import Axes
from opsin.records.folder import write_atomically
from opsin.task import Batch
from opsin.training.module import OpsinModule
from opsin.training.objective import scored_logits

REPEATED_SET = "repeated"
"""The evaluation set whose second half repeats the first."""

ABLATION_EFFECTS = ("total", "direct")
"""Effects of an ablation: with the scale of the last LayerNorm recomputed, and with the scale as it is."""

CHANGE_PARTS = tuple(f"{effect}_{field.name}" for effect in ABLATION_EFFECTS for field in fields(Compared))
"""Names of the numbers that are recorded of an ablation."""

MOST_DRAWS = 10_000
"""Random output weights that an ablation may be compared with."""


class ConfidenceStudy(Reader):
    """Draws, at the end, how sure a model is along a sequence that repeats itself, and which neurons make it so.

    After Stolfo et al. 2024, "Confidence Regulation Neurons in Language Models", the case study of induction. On the
    evaluation set ``repeated``, for every member: loss and entropy at each position; the activations of its entropy
    neurons (candidates as ``EntropyNeurons`` has them, by the final weights on the probe); and how the entropy on the
    repeated part changes when each of them, and all of them together, are held at the mean activation they have on the
    first half, with the scale of the last LayerNorm recomputed (total) or as it is (direct). The control is the same
    ablation of output weights of the same norms and of random directions. Where no neuron is a candidate, those whose
    total effect times mediated share is largest are shown in their place and called *not candidates*.

    Activations are those under the interventions in force; what an ablation does is computed for the read-out of the
    weights alone, as if nothing were clamped between ``hook_post`` and the last ``hook_resid_post``.

    Recorded once, as ``confidence/...``: ``loss`` and ``entropy`` (nats) with axis ``position``; ``activation`` of all
    neurons of the last MLP with axes ``neuron`` and ``position``; with axis ``neuron`` ``candidate`` (1 or 0) and, of
    each ablation of a shown neuron, ``total_value`` (nats, ablated minus not), ``total_control`` (mean of the control),
    ``total_low`` and ``total_high`` (between them are 95 % of it), and the same of ``direct``; ``confidence/all/...``
    is what all of them do together. Where nothing is measured, at positions that are not scored or of neurons that are
    not shown, there is no number (nan). In the run folder: ``confidence.png``, which W&B receives too. The module's
    summary receives the changes under ``confidence``, for several members as a list.
    Read-only; nothing is measured before training ends.

    Args:
        top: neurons that are shown where none is a candidate.
        draws: random output weights that each ablation is compared with.

    Raises:
        ConfigError: a number out of its range or, when training starts, a model without MLPs or LayerNorm or with fewer
            neurons, or a task without the evaluation set.
    """

    name = "confidence"

    def __init__(self, top: int = 3, draws: int = 40) -> None:
        self.top = check_count("ConfidenceStudy.top", top, "neuron")
        self.draws = check_count("ConfidenceStudy.draws", draws, most=MOST_DRAWS)
        self._studies: list[Study] = []

    def sites(self, table: SiteTable) -> list[str]:
        return [*last_layer_sites(table), "hook_logits"]

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        neurons, positions = {"neuron": sites.size("N")}, {"position": sites.size("L")}
        found: dict[str, Axes] = {"loss": positions, "entropy": positions, "activation": neurons | positions}
        found |= {"candidate": neurons} | {part: neurons for part in CHANGE_PARTS}
        found |= {f"all/{part}": {} for part in CHANGE_PARTS}
        return {f"{self.name}/{metric}": axes for metric, axes in found.items()}

    def requirements(self) -> list[Requirement]:
        return [*needs_read_out("ConfidenceStudy"), needs_evaluation_set("ConfidenceStudy", REPEATED_SET)]

    def check(self, module: OpsinModule) -> None:
        neurons = module.sites.size("N")
        if self.top > neurons:
            raise ConfigError("ConfidenceStudy.top", self.top, f"at most the model's {neurons} neurons of a layer")
        first, repeated = _halves(module.task.batch(0, 0, f"eval/{REPEATED_SET}"))
        if not (first.any() and repeated.any()):
            short = f"{type(module.task).__name__} of {len(module.task.layout.scored)} positions"
            expected = f"more of them: in {REPEATED_SET!r} none is foreseen from the first half in every sequence"
            raise ConfigError("ConfidenceStudy", short, expected)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder, self._final = run_folder(trainer), trainer.max_steps
        self._layer, self._studies = self._module.sites.layers - 1, []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        studies = self._measured()
        rows = [self._summary(study) for study in studies]
        self.summarise(self.name, rows)
        if self._module.is_trained:
            self._record(studies)
        picture = self._drawn(range(min(len(studies), PICTURED_MEMBERS)))
        write_atomically(self._folder / f"{self.name}.png", lambda file: picture.save(file, format="png"))

    # ---- measuring ------------------------------------------------------------------------------

    def _measured(self) -> list[Study]:
        """The study of every member; measured once, at the first call after training has ended."""
        if not self._studies:
            self._studies = _study(self._module, self._layer, self.top, self.draws)
        return self._studies

    # ---- records and summary -------------------------------------------------------------------

    def _neuron_name(self, ablated: Change) -> str:
        """Name of the ablated neuron as ``Ablate`` takes it; ``all`` for several together."""
        return f"{self._layer}:{ablated.neurons[0]}" if len(ablated.neurons) == 1 else "all"

    def _record(self, studies: Sequence[Study]) -> None:
        step, sizes = self._module.steps_done, self.records(self._module.sites)
        if self._module.history.ends_at(f"{self.name}/loss", step):
            return
        found = {metric: torch.full((len(studies), *axes.values()), torch.nan) for metric, axes in sizes.items()}
        for member, study in enumerate(studies):
            positions = list(study.positions)
            found[f"{self.name}/loss"][member, positions] = study.loss.float()
            found[f"{self.name}/entropy"][member, positions] = study.entropy.float()
            found[f"{self.name}/activation"][member][:, positions] = study.activation.float()
            found[f"{self.name}/candidate"][member] = 0.0
            found[f"{self.name}/candidate"][member, list(study.neurons)] = float(study.candidate)
            for ablated, part in product(study.changes, CHANGE_PARTS):
                effect, _, name = part.partition("_")
                value = getattr(getattr(ablated, effect), name)
                if len(ablated.neurons) == 1:
                    found[f"{self.name}/{part}"][member, ablated.neurons[0]] = value
                else:
                    found[f"{self.name}/all/{part}"][member] = value
        self._module.record(step, found)

    def _summary(self, study: Study) -> dict[str, Any]:
        def parts(compared: Compared) -> dict[str, float | None]:
            return {name: value if value == value else None for name, value in asdict(compared).items()}

        def row(ablated: Change) -> dict[str, Any]:
            effects = {effect: parts(getattr(ablated, effect)) for effect in ABLATION_EFFECTS}
            return {"neurons": self._neuron_name(ablated), **effects}

        return {"candidates": study.candidate, "entropy_change": [row(ablated) for ablated in study.changes]}

    # ---- pictures -------------------------------------------------------------------------------

    def picture(self, member: int) -> Image.Image | None:
        """One member's row of the figure; None before training has ended."""
        ended = bool(self._studies) or self._module.steps_done >= self._final
        if not ended:
            return None
        self._measured()
        return self._drawn([member])

    def _drawn(self, members: range | list[int]) -> Image.Image:
        studies = self._measured()
        several = self._module.n_members > 1
        figure = confidence_figure(
            [studies[member] for member in members],
            [f"member {member}" if several else "" for member in members],
            self._layer,
            f"Sequences that repeat themselves, after {self._module.steps_done:,} steps",
        )
        return as_image(figure)


@torch.no_grad()
def _study(module: OpsinModule, layer: int, top: int, draws: int) -> list[Study]:
    """The study of every member by its final weights."""
    batch, sites = module.evaluation_set(REPEATED_SET), last_layer_sites(module.sites)
    scored = list(batch.layout.scored)
    seen = module.observe(batch, [*sites, "hook_logits"])
    resid, post = (seen[site][:, :, scored] for site in sites)
    logits = scored_logits(seen["hook_logits"], batch)
    losses = module.task.objective.entry_loss(logits, batch)
    loss, entropy = (x.mean(1).cpu() for x in (losses, token_entropy(logits)))
    first, repeated = _halves(batch)
    means = post[:, :, first].mean((1, 2), keepdim=True)
    effect, candidate = _candidates(module)
    w_out = read_out_and_outputs(module)[1]
    studies = []
    for m in range(module.n_members):
        neurons, member = strongest(effect, candidate, m, top), slice(m, m + 1)
        weights = {name: value[member].detach() for name, value in module.parameters_by_name().items()}
        last_layer = (ReadOut.of(weights), resid[member][:, :, repeated], post[member][:, :, repeated], w_out[member])
        groups = [[neuron] for neuron in neurons] + ([neurons] if len(neurons) > 1 else [])
        changes = tuple(change(*last_layer, group, means[member], draws) for group in groups)
        activation = post[m].mean(0).T.cpu()
        shown = tuple(neurons), bool(candidate[m].any()), activation, changes
        studies.append(Study(tuple(scored), repeated.cpu(), loss[m], entropy[m], *shown))
    return studies


def _halves(batch: Batch) -> tuple[Bool[Tensor, " Q"], Bool[Tensor, " Q"]]:
    """Which scored positions are in the first half, and at which every sequence has shown the output before."""
    scored = torch.tensor(batch.layout.scored, device=batch.tokens.device)
    return scored < batch.tokens.shape[-1] // 2, batch.truth.query[:, :, scored].all(1).all(0)


def _candidates(module: OpsinModule) -> tuple[Effect, Bool[Tensor, "M N"]]:
    """Effects on the entropy and candidates, as ``EntropyNeurons`` has them."""
    sites, scored = last_layer_sites(module.sites), list(module.probe.layout.scored)
    seen = module.observe(module.probe, list(sites))
    effects, control = effects_and_control(module, *(seen[site][:, :, scored] for site in sites))
    return effects["entropy"], candidates(effects["entropy"], control["entropy"])
