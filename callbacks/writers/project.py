"""Project: silence directions instead of neurons, by projection onto or away from a subspace.

Legend: M members, B batch, H heads, R labelled rows, W width of a site's last axis, C columns of a basis.
"""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from opsin.callbacks.writers.base import ActivationWriter, heads_of_site
from opsin.errors import ConfigError
from opsin.interventions.intervention import Intervention
from opsin.interventions.schedules import Schedule
from opsin.interventions.values.directions import (
    GivenDirections,
    LearnedDirections,
    WeightDirections,
    read_directions,
    renewal,
    singular_directions,
    weight_matrix,
)
from opsin.interventions.values.nullspace import Learned, labelled_rows, learn_directions
from opsin.interventions.values.subspaces import Basis, Projected
from opsin.model.sites import AXES, Site, SiteTable
from opsin.training.module import opsin_module
from opsin.training.observers import Observation

PROJECTED = "DNEV"
"""Last axes that have directions."""


class Project(ActivationWriter):
    """Remove from a site its part along some directions, or keep nothing but that part.

    Gradient: flows through the part that is left; exactly none along what is removed, and none into the directions.

    The directions are given, or they are singular vectors of a weight, or those along which a linear
    classifier reads a label off the probe (Ravfogel et al. 2020), with this writer switched off and all other
    writers as they stand. The latter two are taken before their step and kept in checkpoints. Learning records,
    per member, ``subspace/SITE/LABEL/accuracy_after_T`` of the classifier after T = 0, 1, ... rounds, and
    ``subspace/SITE/LABEL/chance``; SITE ends in ``:HEAD`` at sites with heads.

    Args:
        site: the activation, for example ``blocks.0.hook_resid_post``; its last axis holds the directions.
        directions: one direction a row, or a path of a ``.npy`` file of such rows; linearly independent, of any length.
        weight: the weight whose singular vectors are the directions, and which of them.
        learn: the label whose linear classifiers read the directions, and when they are fitted.
        mode: ``remove`` the part along the directions, or ``keep`` it alone.
        about: the point that stays where it is: ``zero`` or the ``mean`` over the batch (at each position and
            member), which is then preserved.
        heads: ``"layer:head"`` at sites with heads; all when None. Each head has its own directions, except
            where they are given.
        positions: positions it acts at, and learns from; all when None.
        members: members it acts in; all when None.
        schedule: strength at every step, in [0, 1]; 1 throughout by default.
        order: rank among writers that touch the same entries; the later wins.

    Raises:
        ConfigError: no or several kinds of directions, directions that do not fit the site, or a
            probe too small to learn from.
    """

    path_settings = ("directions",)

    def __init__(
        self,
        site: str,
        directions: list[list[float]] | str | None = None,
        weight: WeightDirections | None = None,
        learn: LearnedDirections | None = None,
        mode: Literal["remove", "keep"] = "remove",
        about: Literal["zero", "mean"] = "zero",
        heads: list[str] | None = None,
        positions: list[int] | None = None,
        members: list[int] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        order: int | None = None,
    ) -> None:
        super().__init__(members, schedule, order, positions)
        origins = {"directions": directions, "weight": weight, "learn": learn}
        named = [setting for setting, origin in origins.items() if origin is not None]
        if len(named) != 1:
            raise ConfigError("Project", named, "one of directions, weight and learn")
        if mode not in ("remove", "keep"):
            raise ConfigError("Project.mode", mode, "'remove' or 'keep'")
        if about not in ("zero", "mean"):
            raise ConfigError("Project.about", about, "'zero' or 'mean'")
        fixed = None if directions is None else read_directions("Project.directions", directions)
        origin = fixed or weight or learn
        assert origin is not None
        self.origin: GivenDirections | WeightDirections | LearnedDirections = origin
        renewed = None if isinstance(origin, GivenDirections) else origin
        self.renewal = None if renewed is None else renewal(renewed, schedule, f"Project.{named[0]}")
        self.site, self.heads, self.mode, self.about = site, heads, mode, about

    # ---- the plan -------------------------------------------------------------------------------

    def interventions(self, sites: SiteTable) -> list[Intervention]:
        """What it projects on a model with these sites."""
        basis = self._basis_on(sites)
        return [self.intervention_at(basis.site, Projected(basis, self.mode, self.about), basis.selection.heads)]

    def _basis_on(self, sites: SiteTable) -> Basis:
        site = sites.find(self.site, "Project.site")
        if site.axes[-1] not in PROJECTED:
            expected = f"a site whose last axis is one of {', '.join(AXES[axis] for axis in PROJECTED)}"
            raise ConfigError("Project.site", site.name, expected)
        if "B" not in site.axes and (self.about == "mean" or isinstance(self.origin, LearnedDirections)):
            raise ConfigError("Project.site", site.name, "a site that differs within the batch, for mean and learn")
        width = site.sizes[site.axes[-1]]
        selection = self.selection(self._chosen_heads(site, sites))
        columns = self._columns(width, sites.size("V"))
        return Basis(site.name, width, columns, site.sizes.get("H"), selection, self.origin, self.renewal)

    def _chosen_heads(self, site: Site, sites: SiteTable) -> tuple[int, ...] | None:
        if self.heads is None:
            return None
        return tuple(sorted(set(heads_of_site("Project.heads", self.heads, site, sites))))

    def _columns(self, width: int, outputs: int) -> int:
        """Most directions that its origin can name in an axis of this width."""
        if isinstance(self.origin, GivenDirections):
            if self.origin.basis.shape[0] != width:
                expected = f"rows of {width}, the width of {self.site}"
                raise ConfigError("Project.directions", f"rows of {self.origin.basis.shape[0]}", expected)
            return self.origin.basis.shape[1]
        if isinstance(self.origin, WeightDirections):
            if self.origin.rank > width:
                raise ConfigError("Project.weight.rank", self.origin.rank, f"at most {width}, the width of {self.site}")
            return self.origin.rank
        return min(width, self.origin.rounds * (outputs - 1)) if self.origin.label == "target" else width

    # ---- directions while training ----------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._module = module = opsin_module(pl_module)
        self._basis = self._basis_on(module.sites)
        # between renewals the handler only compares numbers
        module.listen(1, self._after_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(self.origin, WeightDirections):
            self._check_weight(self.origin)
        if isinstance(self.origin, LearnedDirections):
            self._check_probe(self.origin)
        # ahead of the readers, to whom the first state is shown as the first step will have it
        steps_done, missing = self._module.steps_done, self._basis in self._module.gates.unsupplied
        if steps_done == 0 or missing:
            self._renew_if_due(steps_done, missing)

    def _check_weight(self, origin: WeightDirections) -> None:
        weight = weight_matrix(
            self._module.parameters_by_name(), self._module.sites.weights, origin.name, origin.side, self._basis.heads
        )
        size, width = weight.shape[-2 if origin.side == "input" else -1], self._basis.width
        if size != width:
            found = f"{origin.name} with {origin.side} {size}"
            raise ConfigError("Project.weight", found, f"{origin.side} {width}, the width of {self.site}")
        if origin.rank > min(weight.shape[-2:]):
            expected = f"at most {min(weight.shape[-2:])} singular vectors of {origin.name}"
            raise ConfigError("Project.weight.rank", origin.rank, expected)

    def _check_probe(self, origin: LearnedDirections) -> None:
        rows, _ = labelled_rows(self._module.probe, origin.label, self.positions)
        if not rows:
            raise ConfigError("Project.positions", self.positions, f"a position that has a {origin.label}")
        # with no more rows than weights any labels can be told apart
        needed = 2 * (self._basis.width // len(rows) + 1)
        if self._module.probe_size < needed:
            expected = f"at least {needed}: half of the probe has to give more rows than the width {self._basis.width}"
            raise ConfigError("model.probe_size", self._module.probe_size, expected)

    def _after_step(self, observation: Observation) -> None:
        if observation.step > 0:
            self._renew_if_due(observation.step)

    def _renew_if_due(self, step: int, missing: bool = False) -> None:
        """Renew the directions at their steps, and where a branch begins after the first of them, at its beginning."""
        batch_size = self._module.task.batch_size
        if self.renewal is None:
            return
        if not (self.renewal.due(step, batch_size) or (missing and self.renewal.begun(step, batch_size))):
            return
        if isinstance(self.origin, WeightDirections):
            self._renew_from_weight(self.origin)
        elif isinstance(self.origin, LearnedDirections):
            self._renew_from_probe(self.origin, step)

    def _renew_from_weight(self, origin: WeightDirections) -> None:
        weight = weight_matrix(
            self._module.parameters_by_name(), self._module.sites.weights, origin.name, origin.side, self._basis.heads
        )
        # a run that has diverged is about to be stopped by the module, which says so
        if weight.isfinite().all():
            self._module.gates.supply(self._basis, singular_directions(weight, origin))

    def _renew_from_probe(self, origin: LearnedDirections, step: int) -> None:
        module, planned = self._module, self._basis
        rows, labels = labelled_rows(module.probe, origin.label, self.positions)
        items = [row.intervention for row in module.plan.interventions]
        projections = [item for item in items if planned in item.value.needs]
        x = module.observe(module.probe, [planned.site], without=projections)[planned.site][:, :, rows].cpu()
        if not x.isfinite().all():
            return
        classes = module.task.n_outputs if origin.label == "target" else module.task.n_tokens

        def learned(activation: Tensor, name: str) -> Tensor:
            found = learn_directions(activation, labels.cpu(), classes, origin.rounds, planned.columns)
            self._record(f"subspace/{name}/{origin.label}", found, step)
            return found.basis

        tensor = planned.initial(module.n_members)
        if planned.heads is None:
            tensor = learned(x, planned.site)
        for head in planned.chosen_heads:
            tensor[:, head] = learned(x[:, :, :, head], f"{planned.site}:{head}")
        module.gates.supply(planned, tensor)

    def _record(self, name: str, found: Learned, step: int) -> None:
        numbers = {f"{name}/accuracy_after_{t}": found.accuracy[:, t] for t in range(found.accuracy.shape[1])}
        numbers[f"{name}/chance"] = found.chance
        self._module.record(step, numbers)
