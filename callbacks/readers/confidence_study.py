"""The case study of confidence at the end of a run: neurons on sequences that repeat themselves, and without them.

Legend: M members, N neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from opsin.callbacks.readers.last_layer import effects_and_control, neuron_sites, read_out_and_outputs, require_neurons
from opsin.callbacks.readers.run_folder import run_folder
from opsin.errors import ConfigError
from opsin.figures.confidence import confidence_figure
from opsin.figures.style import PICTURED_MEMBERS, as_image
from opsin.metrics.confidence import Change, Compared, Study, change, strongest, token_entropy
from opsin.metrics.mean_ablation import Effect, candidates
from opsin.metrics.neuron_weights import ReadOut
from opsin.records.folder import write_atomically
from opsin.task import Batch
from opsin.training.module import OpsinModule, opsin_module
from opsin.training.objective import cross_entropy, scored_logits

SET = "repeated"
"""The evaluation set whose second half repeats the first."""

KINDS = ("total", "direct")
Line = tuple[str, str, int | str, float]


class ConfidenceStudy(Callback):
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

    In the run folder: ``confidence.csv`` with one row a number (``member, what, neuron, position, value``), and
    ``confidence.png``, which W&B receives too. ``what`` is ``loss``, ``entropy`` (nats), ``activation``, ``candidate``
    (1 or 0), and of each ablation ``total_value`` (nats, ablated minus not), ``total_control`` (mean of the control),
    ``total_low`` and ``total_high`` (between them are 95 % of it), and the same of ``direct``; neuron ``all`` is all
    together. The module's summary receives the changes under ``confidence``, for several members as a list.
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
        if top < 1:
            raise ConfigError("ConfidenceStudy.top", top, "at least 1 neuron")
        if draws < 1:
            raise ConfigError("ConfidenceStudy.draws", draws, "at least 1")
        self.top, self.draws = top, draws
        self._studies: list[Study] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        module = opsin_module(pl_module)
        require_neurons("ConfidenceStudy", module.transformer)
        if SET not in module.task.evaluations:
            own = f"{type(module.task).__name__} with {', '.join(module.task.evaluations)}"
            raise ConfigError("ConfidenceStudy", own, f"a task with an evaluation set {SET!r}")
        neurons = module.transformer.neurons
        if neurons is not None and self.top > neurons:
            raise ConfigError("ConfidenceStudy.top", self.top, f"at most the model's {neurons} neurons of a layer")
        first, repeated = _parts(module.task.batch(0, 0, f"eval/{SET}"))
        if not (first.any() and repeated.any()):
            own = f"{type(module.task).__name__} of {len(module.task.layout.scored)} positions"
            expected = f"more of them: in {SET!r} none is foreseen from the first half in every sequence"
            raise ConfigError("ConfidenceStudy", own, expected)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._module, self._folder, self._final = opsin_module(pl_module), run_folder(trainer), trainer.max_steps
        self._layer, self._studies = self._module.sites.layers - 1, []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        studies = self._seen()
        rows = [self._summary(study) for study in studies]
        self._module.summary[self.name] = rows[0] if len(rows) == 1 else rows
        lines = ["member,what,neuron,position,value"]
        for member, study in enumerate(studies):
            lines += [",".join([str(member), *map(str, line)]) for line in self._lines(study)]
        write_atomically(self._folder / f"{self.name}.csv", "\n".join(lines) + "\n")
        picture = self._drawn(range(min(len(studies), PICTURED_MEMBERS)))
        write_atomically(self._folder / f"{self.name}.png", lambda file: picture.save(file, format="png"))

    # ---- measuring ------------------------------------------------------------------------------

    def _seen(self) -> list[Study]:
        """Of every member; measured once, by whoever asks first when training has ended."""
        if not self._studies:
            self._studies = _study(self._module, self._layer, self.top, self.draws)
        return self._studies

    # ---- what is left behind --------------------------------------------------------------------

    def _called(self, ablated: Change) -> str:
        """As ``Ablate`` takes a neuron."""
        return f"{self._layer}:{ablated.neurons[0]}" if len(ablated.neurons) == 1 else "all"

    def _lines(self, study: Study) -> Iterator[Line]:
        for what in ("loss", "entropy"):
            for position, value in zip(study.positions, getattr(study, what).tolist(), strict=True):
                yield what, "", position, value
        for neuron, values in zip(study.neurons, study.activation.tolist(), strict=True):
            yield "candidate", f"{self._layer}:{neuron}", "", float(study.candidate)
            for position, value in zip(study.positions, values, strict=True):
                yield "activation", f"{self._layer}:{neuron}", position, value
        for ablated in study.changes:
            for kind in KINDS:
                for part, value in asdict(getattr(ablated, kind)).items():
                    yield f"{kind}_{part}", self._called(ablated), "", value

    def _summary(self, study: Study) -> dict[str, Any]:
        def parts(compared: Compared) -> dict[str, float | None]:
            return {name: value if value == value else None for name, value in asdict(compared).items()}

        changes = [
            {"neurons": self._called(ablated), **{kind: parts(getattr(ablated, kind)) for kind in KINDS}}
            for ablated in study.changes
        ]
        return {"candidates": study.candidate, "entropy_change": changes}

    # ---- pictures -------------------------------------------------------------------------------

    def picture(self, member: int) -> Image.Image | None:
        """One member's row of the figure; None before training has ended."""
        ended = bool(self._studies) or self._module.steps_done >= self._final
        if not ended:
            return None
        self._seen()
        return self._drawn([member])

    def _drawn(self, members: range | list[int]) -> Image.Image:
        studies = self._seen()
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
    """Every member by its final weights."""
    batch, sites = module.evaluation_set(SET), neuron_sites(module)
    scored = list(batch.layout.scored)
    seen = module.observe(batch, [*sites, "hook_logits"])
    resid, post = (seen[site][:, :, scored] for site in sites)
    logits = scored_logits(seen["hook_logits"], batch)
    loss, entropy = (x.mean(1).cpu() for x in (cross_entropy(logits, batch), token_entropy(logits)))
    first, repeated = _parts(batch)
    means = post[:, :, first].mean((1, 2), keepdim=True)
    effect, candidate = _candidates(module)
    w_out = read_out_and_outputs(module)[1]
    studies = []
    for m in range(module.n_members):
        neurons, one = strongest(effect, candidate, m, top), slice(m, m + 1)
        own = {name: value[one].detach() for name, value in module.parameters_by_name().items()}
        given = (ReadOut.of(own), resid[one][:, :, repeated], post[one][:, :, repeated], w_out[one])
        groups = [[neuron] for neuron in neurons] + ([neurons] if len(neurons) > 1 else [])
        changes = tuple(change(*given, group, means[one], draws) for group in groups)
        activation = post[m][..., neurons].mean(0).T.cpu()
        shown = tuple(neurons), bool(candidate[m].any()), activation, changes
        studies.append(Study(tuple(scored), repeated.cpu(), loss[m], entropy[m], *shown))
    return studies


def _parts(batch: Batch) -> tuple[Bool[Tensor, " Q"], Bool[Tensor, " Q"]]:
    """Of the scored positions, those in the first half, and those whose output every sequence has shown before."""
    scored = torch.tensor(batch.layout.scored, device=batch.tokens.device)
    return scored < batch.tokens.shape[-1] // 2, batch.truth.query[:, :, scored].all(1).all(0)


def _candidates(module: OpsinModule) -> tuple[Effect, Bool[Tensor, "M N"]]:
    """Effects on the entropy and candidates, as ``EntropyNeurons`` has them."""
    sites, scored = neuron_sites(module), list(module.probe.layout.scored)
    seen = module.observe(module.probe, list(sites))
    effects, control = effects_and_control(module, *(seen[site][:, :, scored] for site in sites))
    return effects["entropy"], candidates(effects["entropy"], control["entropy"])
