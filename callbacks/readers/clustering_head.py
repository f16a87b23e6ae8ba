"""ClusteringHead: how sequences that are pooled into one point form clusters, and when a classifier tells them apart.

Legend: M members, B sequences of the probe, L and K positions, D width, V outputs, G points of a grid's side.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from lightning.pytorch import LightningModule, Trainer
from PIL.Image import Image
from torch import Tensor

from opsin.callbacks.readers.base import ProbeReader, Requirement, needs_classes
from opsin.callbacks.readers.run_folder import run_folder
from opsin.errors import ConfigError
from opsin.figures.plane import PlaneState, plane_figure
from opsin.figures.style import as_image, save_figure
from opsin.metrics.clusters import attention_share, explained_share, loss_spikes
from opsin.model.sites import SiteTable
from opsin.objective import accuracy, entry_mean
from opsin.records.axes import Axes
from opsin.records.history import Question, is_at_least, is_below
from opsin.records.schema import TRAIN_LOSS
from opsin.task import Batch
from opsin.training.module import OpsinModule
from opsin.training.objective import scored_logits
from opsin.training.observers import Observation

SEEN, VALUES, PATTERN, POINT, CLASS_LOGITS = (
    *("ln1.hook_normalized", "pool.hook_v", "pool.hook_pattern", "pool.hook_z"),
    "hook_logits",
)
CLUSTERED, SOLVED = 0.1, 0.99
"""Share of the variance within clusters below which they have formed, and accuracy from which a task is solved."""

GRID = 61
"""Points along each side of the plane at which the classifier is evaluated."""

MARGIN = 1.15
"""Side of the square that is shown, in units of the farthest points' distance along it."""


@runtime_checkable
class ClusteredTask(Protocol):
    """A task that knows by what clusters of sequences it can be solved."""

    def shifts(self) -> list[tuple[int, ...]]:
        """Symmetries of the task that make one clustering of another, the plain one first."""

    def clusterings(self, batch: Batch) -> Iterator[Int64[Tensor, "M B"]]:
        """Cluster of every sequence, once for each of ``shifts``."""


class ClusteringHead(ProbeReader):
    """Measures on the probe the clusters of the points that a pooling head makes of sequences, and draws the plane.

    Odonnat, Bouaziz and Cabannes 2024, "Clustering head": sequences first form clusters by what decides their answer,
    then the classifier is fitted. Read-only, under the interventions in force. Recorded and logged, ``[M]`` each, as
    ``clustering/...``:

    - ``within_share``: share of the variance of the points (``pool.hook_z``) that lies within clusters, those of the
      task's clusterings that fit a member best. A clustering is by the counts of tokens at relevant positions, which
      may be shifted position by position, as the sum then changes by a constant: a model of bits may count ones at some
      positions and noughts at others;
    - ``within_counts_share``: the same with plain counts, unshifted; ``within_target_share``: with the right answers;
    - ``irrelevant_attention``: share of the attention that goes to positions that decide nothing (no measure of
      success: their contributions may cancel);
    - ``accuracy`` on the probe;
    - ``clustered_at``, ``solved_at``: optimizer steps at the first measurement with a share within clusters below 10 %,
      and with an accuracy of at least 99 %; nan until then;
    - ``solved``: 1 from then on, else 0; ``clusters_first``: for what is solved, 1 if clusters had formed at an earlier
      measurement, else 0; nan before. In a population the means of the two are shares of seeds.

    In the run folder: ``plane.png``, which W&B shows while training, a column for each of ``pictures``, of the first
    member that is solved (else of the first): normalised vectors of tokens and positions, the attention to each, its
    values, and the points of sequences over the regions of the classifier. The module's summary receives under
    ``clustering``, for several members as a list, ``clustered_at``, ``solved_at``, ``shift``, that of the clustering
    which fits the final points best, and ``loss_spikes``, the steps at which the training loss began to spike
    (``opsin.metrics.clusters.loss_spikes``).

    Args:
        every: optimizer steps between measurements; the first and the last state are always measured.
        pictures: optimizer steps whose state is drawn, multiples of ``every``; none for no picture.

    Raises:
        ConfigError: fewer than one step, or a picture between measurements; when training starts, a model that does not
            pool sequences into a point of a plane, or a task without classes, clusterings or ``Truth.relevant``.
    """

    name = "clustering"

    def __init__(self, every: int = 64, pictures: list[int] | None = None) -> None:
        super().__init__(every)
        self.pictures = sorted({*(pictures or ())})
        for step in self.pictures:
            if step < 0 or step % every:
                raise ConfigError("ClusteringHead.pictures", step, f"multiples of every, {every}")
        self._states: list[PlaneState] = []
        self._best: Int64[Tensor, " M"] | None = None
        # one object each, by which the history knows what it has answered
        self._clustered, self._solved = partial(is_below, CLUSTERED), partial(is_at_least, SOLVED)

    # ---- what it needs and says -----------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return self._generate_state_key(every=self.every, pictures=self.pictures)

    def state_dict(self) -> dict[str, Any]:
        return {"states": [dict(vars(state)) for state in self._states]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._states = [PlaneState(**state) for state in state_dict["states"]]

    def member_state(self, state: dict[str, Any], member: int) -> dict[str, Any]:
        """The state of a run that has this member alone."""
        return {"states": [vars(PlaneState(**row).of_member(member)) for row in state["states"]]}

    def sites(self, table: SiteTable) -> list[str]:
        return [SEEN, VALUES, PATTERN, POINT, CLASS_LOGITS]

    def requirements(self) -> list[Requirement]:
        def without_relevant(module: OpsinModule) -> str | None:
            relevant = module.task.batch(0, 0, "train", 1).truth.relevant
            return None if relevant is not None else type(module.task).__name__

        def without_clusterings(module: OpsinModule) -> str | None:
            return None if isinstance(module.task, ClusteredTask) else type(module.task).__name__

        return [
            needs_classes("ClusteringHead"),
            Requirement("ClusteringHead", without_relevant, "a task that says which positions decide (Truth.relevant)"),
            Requirement("ClusteringHead", without_clusterings, "a task that knows its clusterings"),
        ]

    def check(self, module: OpsinModule) -> None:
        width = module.sites[POINT].sizes["D"]
        if self.pictures and width != 2:
            raise ConfigError("ClusteringHead.pictures", f"a model of width {width}", "one of width 2, or no pictures")

    def records(self, sites: SiteTable) -> dict[str, Axes]:
        shares = ("within_share", "within_counts_share", "within_target_share", "irrelevant_attention", "accuracy")
        outcomes = ("clustered_at", "solved_at", "solved", "clusters_first")
        return {f"{self.name}/{number}": {} for number in (*shares, *outcomes)}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._states, self._best = [], None

    # ---- while training -------------------------------------------------------------------------

    def measure(self, seen: Observation) -> None:
        module, batch, task, relevant = self._module, seen.batch, self._module.task, seen.batch.truth.relevant
        # what requirements have found
        assert relevant is not None and isinstance(task, ClusteredTask)
        points, logits = seen.activations[POINT][:, :, 0], scored_logits(seen.activations[CLASS_LOGITS], batch)
        shares = torch.stack([1 - explained_share(points, clusters) for clusters in task.clusterings(batch)])
        within, self._best = shares.min(0)
        found = {
            "within_share": within,
            "within_counts_share": shares[0],
            "within_target_share": 1 - explained_share(points, batch.targets[..., -1]),
            "irrelevant_attention": attention_share(seen.activations[PATTERN], ~relevant),
            "accuracy": entry_mean(accuracy(logits, batch), batch),
        }
        module.record(seen.step, {f"{self.name}/{number}": values for number, values in found.items()})
        self._record_outcome(seen.step)
        if seen.step in self.pictures:
            self._states.append(self._state(seen))

    def _record_outcome(self, step: int) -> None:
        clustered = self._first("within_share", self._clustered)
        solved = self._first("accuracy", self._solved)
        first = torch.where(solved.isnan(), torch.nan, (clustered < solved).float())
        found = {"clustered_at": clustered, "solved_at": solved, "solved": (~solved.isnan()).float()}
        found["clusters_first"] = first
        self._module.record(step, {f"{self.name}/{number}": values for number, values in found.items()})

    def _first(self, number: str, question: Question) -> Float[Tensor, " M"]:
        """Steps at the first record to which the answer is yes; nan where there is none."""
        return torch.from_numpy(self._module.history[f"{self.name}/{number}"].first_or_nan(question)).float()

    # ---- pictures -------------------------------------------------------------------------------

    def _state(self, seen: Observation) -> PlaneState:
        """What is drawn of one step, of all members."""
        points, tokens = seen.activations[POINT][:, :, 0], seen.batch.tokens
        low, high = points.amin(1), points.amax(1)
        # points that are no numbers, or all the same, span no square
        centre = ((low + high) / 2).nan_to_num(0.0, 0.0, 0.0)
        reach = (MARGIN * (high - low).amax(1) / 2).nan_to_num(1.0, 1.0, 1.0).clamp(min=1e-6)
        shown = {
            "seen": _by_token(seen.activations[SEEN], tokens),
            "values": _by_token(seen.activations[VALUES], tokens),
            "attention": _by_token(seen.activations[PATTERN][..., None], tokens)[..., 0],
            "points": points,
            "classes": seen.batch.targets[..., -1],
            "centre": centre,
            "reach": reach,
            "probabilities": self._probabilities(seen, centre, reach),
        }
        return PlaneState(seen.step, **{name: x.cpu() for name, x in shown.items()})

    def _probabilities(
        self, seen: Observation, centre: Float[Tensor, "M 2"], reach: Float[Tensor, " M"]
    ) -> Float[Tensor, "M G G V"]:
        """What the classifier says at every point of the square, rows from below."""
        side = torch.linspace(-1, 1, GRID, device=reach.device)
        square = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).flatten(0, 1)  # G*G 2
        grid = (centre[:, None] + reach[:, None, None] * square)[:, :, None]
        passes = self._module.forward_passes
        tap = passes.tap(seen.batch)

        def with_grid(name: str, x: Tensor) -> Tensor:
            return grid.to(x) if name == POINT else tap(name, x)

        logits = passes.activations(seen.batch, [CLASS_LOGITS], with_grid)[CLASS_LOGITS][:, :, -1]
        return logits.softmax(-1).unflatten(1, (GRID, GRID))

    def picture(self, member: int) -> Image | None:
        """The plane of one member at the steps so far; None before the first."""
        states = [state.of_member(member) for state in self._states]
        return as_image(plane_figure(states, self._relevant())) if states else None

    def _relevant(self) -> Bool[Tensor, " L"]:
        relevant = self._module.probe.truth.relevant
        assert relevant is not None
        return relevant.cpu()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = self._module
        rows = [self._summary(member) for member in range(module.n_members)]
        self.summarise(self.name, rows)
        if self._states:
            solved = [member for member, row in enumerate(rows) if row["solved_at"] is not None]
            states = [state.of_member(solved[0] if solved else 0) for state in self._states]
            save_figure(plane_figure(states, self._relevant()), run_folder(trainer) / "plane.png")

    def _summary(self, member: int) -> dict[str, Any]:
        history = self._module.history
        found: dict[str, Any] = {}
        for number in ("clustered_at", "solved_at"):
            step = float(history[f"{self.name}/{number}"].values[-1][member])
            found[number] = None if np.isnan(step) else int(step)
        found["shift"] = self._shift(member)
        steps, losses = history[TRAIN_LOSS].arrays()
        known = np.isfinite(losses[:, member])
        found["loss_spikes"] = [int(steps[known][index]) for index in loss_spikes(losses[known, member])]
        return found

    def _shift(self, member: int) -> list[int] | None:
        """The shift of the clustering that fits best after the last step; None where nothing varies, or is measured."""
        task, within = self._module.task, self._module.history[f"{self.name}/within_share"].values[-1][member]
        if self._best is None or np.isnan(within) or not isinstance(task, ClusteredTask):
            return None
        return list(task.shifts()[int(self._best[member])])


def _by_token(x: Float[Tensor, "M B L C"], tokens: Tensor) -> Float[Tensor, "M L T C"]:
    """Mean over the sequences that have a token at a position, for each position and token; nan where none has."""
    shown = torch.nn.functional.one_hot(tokens).to(x.dtype)  # M B L T
    return torch.einsum("mblt,mblc->mltc", shown, x) / shown.sum(1)[..., None]
