"""Readers of the last MLP: neurons that set the confidence of a model, and when they form.

Legend: M members, N neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor

from opsin.callbacks.readers.base import MOST_PER_DECADE, ProbeReader, Requirement, log_spaced
from opsin.callbacks.readers.last_layer import (
    effects_and_control,
    last_layer_sites,
    needs_read_out,
    read_out_and_outputs,
)
from opsin.callbacks.readers.run_folder import run_folder
from opsin.errors import ConfigError
from opsin.figures.neurons import neuron_figure
from opsin.figures.style import PICTURED_MEMBERS, as_image
from opsin.metrics.cusum import Watch, watch
from opsin.metrics.mean_ablation import Effect, Mediator, candidates, control_level, finite_unigram
from opsin.metrics.neuron_weights import NullShare, logit_var, null_share, weight_norm
from opsin.model.sites import SiteTable
from opsin.records.axes import Axes
from opsin.records.folder import write_atomically
from opsin.training.module import OpsinModule
from opsin.training.observers import Event, Observation

LASTING_MEASUREMENTS = 3.0
"""Measurements with a candidate, less those without one, that make a lasting onset."""

EFFECT_PARTS = ("total", "direct", "mediated", "total_signed", "direct_signed")
SUMMARY_COLUMNS = ("weight_norm", "logit_var", "rho")
NEURON_COLUMNS = (
    "candidate",
    *SUMMARY_COLUMNS,
    *(f"{effect}_{part}" for effect in ("entropy", "loss", "kl") for part in EFFECT_PARTS),
)
"""What is known of every neuron; KL where the task has a unigram."""


@dataclass(frozen=True)
class NeuronMeasurement:
    """One measurement of all neurons of the last MLP.

    Args:
        step: optimizer steps finished when it was made.
        columns: what is known of every neuron, by name.
        numbers: metrics with one number a member, by name without that of the reader.
    """

    step: int
    columns: dict[str, Shaped[Tensor, "M N"]]
    numbers: dict[str, Float[Tensor, " M"]]

    def of_member(self, member: int) -> NeuronMeasurement:
        """The measurement of a run which has this member alone."""
        columns, numbers = (
            {name: values[member : member + 1].clone() for name, values in table.items()}
            for table in (self.columns, self.numbers)
        )
        return NeuronMeasurement(self.step, columns, numbers)


class NeuronTracker(ProbeReader):
    """Measures the neurons of the last MLP at a cadence: every neuron, the candidates among them and when those formed.

    A subclass says which effect of a neuron decides and through what it passes.

    Attributes:
        name: name of the metrics, the picture and the summary's entry.
        kind: kind of the announced events.
        effect: effect that decides on candidates: ``entropy``, ``loss`` or ``kl``.
        mediator: what the mediated share of an effect passes through.
        carrier: effect and mediator in words, for the figure.
        numbers: names of the recorded metrics.
        null_dimensions: directions that count as unseen by the unembedding; None for those of small singular values.

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
        tables: records of every neuron in each tenfold of optimizer steps, beside that of the last step; 0 for that
            one alone.
    """

    name: str
    kind: str
    effect: str
    mediator: Mediator
    carrier: str
    numbers: tuple[str, ...] = (
        *("candidates", "mediated", "total"),
        *("control_candidates", "control_mediated", "control_total"),
    )
    null_dimensions: int | None = None

    def __init__(self, every: int = 500, tables: int = 3) -> None:
        super().__init__(every)
        if not 0 <= tables <= MOST_PER_DECADE:
            raise ConfigError(f"{type(self).__name__}.tables", tables, "0 or more")
        self.tables = tables
        self._forget(0)

    def _forget(self, members: int) -> None:
        self._watches = [Watch()] * members
        self._last: NeuronMeasurement | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(every=self.every, null_dimensions=self.null_dimensions)

    def state_dict(self) -> dict[str, Any]:
        last = None if self._last is None else dict(vars(self._last))
        return {"watches": [state.to_dict() for state in self._watches], "last": last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._watches = [Watch(**state) for state in state_dict["watches"]]
        self._last = None if state_dict["last"] is None else NeuronMeasurement(**state_dict["last"])

    def member_state(self, state: dict[str, Any], member: int) -> dict[str, Any]:
        """The state of a run that has this member alone."""
        last = state["last"] and dict(vars(NeuronMeasurement(**state["last"]).of_member(member)))
        return {"watches": [state["watches"][member]], "last": last}

    def sites(self, table: SiteTable) -> list[str]:
        return [*last_layer_sites(table)]

    def requirements(self) -> list[Requirement]:
        return needs_read_out(type(self).__name__)

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        neurons = {"neuron": sites.size("N")}
        numbers: dict[str, Axes] = {f"{self.name}/{number}": {} for number in self.numbers}
        return numbers | {self._neuron_metric(column): neurons for column in NEURON_COLUMNS}

    def _neuron_metric(self, column: str) -> str:
        return f"{self.name}/neuron/{column}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget(self._module.n_members)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = run_folder(trainer)
        self._table_times = {trainer.max_steps}
        self._table_times |= log_spaced(trainer.max_steps, self.tables) if self.tables else set()
        self._layer = self._module.sites.layers - 1
        unigram = self._module.task.unigram()
        self._unigram = None if unigram is None else finite_unigram(unigram)
        super().on_fit_start(trainer, pl_module)

    # ---- while training -------------------------------------------------------------------------

    def measure(self, seen: Observation) -> None:
        found = self._last = self._measured(seen)
        self._module.record(seen.step, {f"{self.name}/{number}": values for number, values in found.numbers.items()})
        # the time of a table may fall between two measurements: the one that reaches it records
        reached = range(max(seen.step - self.every + 1, 0), seen.step + 1)
        if any(step in self._table_times for step in reached):
            self._record_neurons(found)
        for member, count in enumerate(found.numbers["candidates"].tolist()):
            self._update(member, seen.step, count)

    def _measured(self, seen: Observation) -> NeuronMeasurement:
        read_out, w_out = read_out_and_outputs(self._module)
        scored = list(seen.batch.layout.scored)
        resid, post = (seen.activations[site][:, :, scored] for site in last_layer_sites(self._module.sites))
        unigram = None if self._unigram is None else self._unigram.to(resid)
        effects, control = effects_and_control(
            self._module, resid, post, targets=seen.batch.targets, unigram=unigram, mediator=self.mediator
        )
        share = null_share(w_out, read_out, self.null_dimensions)
        chosen = candidates(effects[self.effect], control[self.effect])
        columns = {"candidate": chosen, "weight_norm": weight_norm(w_out), "logit_var": logit_var(w_out, read_out)}
        columns["rho"] = share.rho
        for name, effect in effects.items():
            columns |= {f"{name}_{part}": getattr(effect, part) for part in EFFECT_PARTS}
        numbers = _counted(effects[self.effect], control[self.effect])
        numbers |= _strongest(effects[self.effect], share) | _against(effects[self.effect], control[self.effect])
        columns, numbers = ({name: x.cpu() for name, x in table.items()} for table in (columns, numbers))
        return NeuronMeasurement(seen.step, columns, {name: numbers[name] for name in self.numbers})

    def _record_neurons(self, found: NeuronMeasurement) -> None:
        known = found.numbers["candidates"].isfinite()[:, None]
        columns = {name: values.float() for name, values in found.columns.items()}
        # a member whose effects are no numbers has no candidates either
        columns["candidate"] = columns["candidate"].where(known, torch.nan)
        self._module.record(found.step, {self._neuron_metric(name): values for name, values in columns.items()})

    def _update(self, member: int, step: int, count: float) -> None:
        x = float(step * self._module.task.batch_size)
        state, fires = watch(
            self._watches[member], x, float(count > 0), before=0.0, after=1.0, way=0.5, patience=LASTING_MEASUREMENTS
        )
        self._watches[member] = state
        if fires:
            where = f" in member {member}" if self._module.n_members > 1 else ""
            message = f"{self.kind}{where}: a candidate lasts since {state.announced:,.0f} sequences"
            self._module.announce(Event(self.kind, step, member, f"{message} (noticed at {x:,.0f})"))

    # ---- at the end -----------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = self._module
        if self._last is None:
            return
        # a run that ended early, whose last step was none of a table until then
        if module.is_trained and not module.history.ends_at(self._neuron_metric("candidate"), self._last.step):
            self._record_neurons(self._last)
        rows = [self._member_summary(self._last, member) for member in range(module.n_members)]
        self.summarise(self.name, rows)
        picture = self._drawn(self._last, range(min(module.n_members, PICTURED_MEMBERS)))
        write_atomically(self._folder / f"{self.name}.png", lambda file: picture.save(file, format="png"))

    def _member_summary(self, found: NeuronMeasurement, member: int) -> dict[str, Any]:
        columns = {name: values[member].tolist() for name, values in found.columns.items()}
        effects = {part: f"{self.effect}_{part}" for part in EFFECT_PARTS[:3]}
        shown = {name: name for name in SUMMARY_COLUMNS} | effects
        rows = [
            {"neuron": f"{self._layer}:{neuron}", **{name: columns[column][neuron] for name, column in shown.items()}}
            for neuron, chosen in enumerate(columns["candidate"])
            if chosen
        ]
        control = {name: float(found.numbers[name][member]) for name in self.numbers if name.startswith("control_")}
        return {
            "onset": self._onset(member),
            "candidates": sorted(rows, key=lambda row: -row["total"]),
            **{name: value if value == value else None for name, value in control.items()},
        }

    def _onset(self, member: int) -> dict[str, float] | None:
        """From the last measurement before the first of those with a candidate, to that one."""
        history, value = self._module.history, self._watches[member].announced
        if value is None:
            return None
        x = history.sequences(history[f"{self.name}/candidates"].arrays()[0])
        return {"value": value, "low": float(max(x[x < value], default=value)), "high": value}

    # ---- pictures -------------------------------------------------------------------------------

    def picture(self, member: int) -> Image.Image | None:
        """Norm against LogitVar at the newest measurement; None before the first."""
        return None if self._last is None else self._drawn(self._last, [member])

    def _drawn(self, found: NeuronMeasurement, members: Sequence[int]) -> Image.Image:
        chosen = list(members)
        columns = {name: values[chosen].numpy() for name, values in found.columns.items()}
        sequences = found.step * self._module.task.batch_size
        figure = neuron_figure(
            columns["weight_norm"],
            columns["logit_var"],
            columns[f"{self.effect}_mediated"],
            columns["candidate"],
            [f"member {member}" if self._module.n_members > 1 else "" for member in chosen],
            f"Neurons of layer {self._layer} after step {found.step:,} ({sequences:,} sequences)",
            f"share of the effect on {self.carrier}",
        )
        return as_image(figure)


class EntropyNeurons(NeuronTracker):
    """Neurons of the last MLP that set the entropy of the output through the scale of the last LayerNorm.

    Stolfo et al. 2024, "Confidence Regulation Neurons in Language Models", section 3; definitions in
    ``opsin.metrics.neuron_weights`` and ``opsin.metrics.mean_ablation``. Measured at the probe's scored positions under
    the interventions in force; what an ablation does is computed for the read-out of the weights alone, as if nothing
    were clamped between ``hook_post`` and the last ``hook_resid_post``. Read-only.

    A *candidate* is a neuron more than half of whose effect on the entropy passes through the scale, and whose effect
    is above the 99th percentile of those of its member's control: as many random output weights, of the same norms
    and with the same activations.

    Recorded and logged, ``[M]`` each, as ``entropy_neurons/...``: ``candidates``, how many, and
    ``control_candidates``, how many of the control are by the same rule; ``total``, the largest effect (nats, mean
    absolute change); ``control_total``, that percentile; ``mediated``, the largest share among neurons whose effect is
    above it (nan where none is); ``control_mediated``, the control's median share; ``rho``, the largest share of an
    output weight on the null directions, and ``rho_chance``.

    At fewer steps (``tables``) and the last one every neuron is recorded, with axis ``neuron``, as
    ``entropy_neurons/neuron/...``: ``candidate`` (1 or 0), ``weight_norm``, ``logit_var``, ``rho``, and of ``entropy``,
    ``loss`` and (where the task has a unigram) ``kl`` from the unigram ``EFFECT_total`` and ``EFFECT_direct``, these
    signed (``..._signed``), and the share ``EFFECT_mediated``.

    In the run folder: ``entropy_neurons.png``, norm against LogitVar at the end, which W&B receives while training. The
    module's summary receives under ``entropy_neurons``, for several members as a list, the final ``candidates``
    (strongest first), the control's three numbers, and ``onset``: ``{"value", "low", "high"}`` in sequences, the
    first measurement from which on a candidate lasts (``LASTING_MEASUREMENTS``) and the measurement before; None where
    none lasts. The onset is announced as an ``Event`` when it is noticed.

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
        tables: records of every neuron in each tenfold of optimizer steps, beside that of the last step; 0 for that
            one alone.
        null_dimensions: directions that count as unseen by the unembedding; None for those whose singular value is
            at most a hundredth of the largest.

    Raises:
        ConfigError: a number out of its range or, when training starts, a model without MLPs or LayerNorm.
    """

    name, kind = "entropy_neurons", "entropy neurons"
    effect, mediator, carrier = "entropy", "scale", "entropy through LayerNorm"
    numbers = (*NeuronTracker.numbers, "rho", "rho_chance")

    def __init__(self, every: int = 500, tables: int = 3, null_dimensions: int | None = None) -> None:
        self.null_dimensions = null_dimensions
        super().__init__(every, tables)

    def check(self, module: OpsinModule) -> None:
        most = module.sites.size("D") - 1
        if self.null_dimensions is not None and not 0 <= self.null_dimensions <= most:
            raise ConfigError("EntropyNeurons.null_dimensions", self.null_dimensions, f"0 to {most}, or null")


class TokenFrequencyNeurons(NeuronTracker):
    """Neurons of the last MLP that move the output toward or away from the unigram distribution of the task.

    Stolfo et al. 2024, "Confidence Regulation Neurons in Language Models", section 4. As ``EntropyNeurons``, but the
    effect is that on KL(model || unigram), and the share that which is lost when the projection of the logits on the
    centred unit log-unigram is restored. Names begin with ``token_frequency_neurons``.

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
        tables: records of every neuron in each tenfold of optimizer steps, beside that of the last step; 0 for that
            one alone.

    Raises:
        ConfigError: a number out of its range or, when training starts, a model without MLPs or LayerNorm, or a task
            of which no output is rarer than another.
    """

    name, kind = "token_frequency_neurons", "token-frequency neurons"
    effect, mediator, carrier = "kl", "frequency", "KL through the log-unigram"

    def requirements(self) -> list[Requirement]:
        def lacking(module: OpsinModule) -> str | None:
            unigram = module.task.unigram()
            known = unigram is not None and not torch.allclose(unigram, unigram.mean())
            return None if known else f"{type(module.task).__name__}, all of whose outputs are as frequent"

        return [*super().requirements(), Requirement("TokenFrequencyNeurons", lacking, "a task with a unigram")]


def _counted(effect: Effect, control: Effect) -> dict[str, Float[Tensor, " M"]]:
    """Candidates, and those of the control; nan for a member whose effects are no numbers."""
    known = (effect.total.sum(-1) + control.total.sum(-1)).isfinite()
    return {
        name: candidates(neurons, control).sum(-1).to(neurons.total.dtype).where(known, torch.nan)
        for name, neurons in {"candidates": effect, "control_candidates": control}.items()
    }


def _strongest(effect: Effect, share: NullShare) -> dict[str, Float[Tensor, " M"]]:
    """The largest numbers of any neuron."""
    # a weight of zeros has no share, a member without numbers none at all
    rho = share.rho.nan_to_num(0).amax(-1).where(share.chance.isfinite(), torch.nan)
    return {"total": effect.total.amax(-1), "rho": rho, "rho_chance": share.chance}


def _against(effect: Effect, control: Effect) -> dict[str, Float[Tensor, " M"]]:
    """The effect beside its control."""
    level = control_level(control)
    passing = torch.where(effect.total > level[:, None], effect.mediated, torch.nan).nan_to_num(-torch.inf).amax(-1)
    return {
        "mediated": torch.where(passing.isfinite(), passing, torch.nan),
        "control_mediated": control.mediated.nanmedian(-1).values,
        "control_total": level,
    }
