"""Sends a run to Weights & Biases: with an account while it trains, without one into files to sync later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from opsin.callbacks.readers.base import log_spaced
from opsin.callbacks.readers.phase_change import PHASE_CHANGE
from opsin.callbacks.readers.run_folder import keeper_of, run_folder
from opsin.callbacks.wandb.member_run import MemberRun
from opsin.callbacks.wandb.members import about_members, summary_of
from opsin.callbacks.wandb.start import Mode, default_mode, open_ledgers, start, unharmed
from opsin.errors import ConfigError
from opsin.figures.attention import attention_figure, position_names
from opsin.figures.style import PICTURED_MEMBERS, as_image
from opsin.metrics.heads import induction_strength
from opsin.records.schema import number_name
from opsin.training.module import callbacks_of, opsin_module
from opsin.training.observers import Event, Pictured

if TYPE_CHECKING:
    import wandb


class WeightsAndBiases(Callback):
    """Everything a run measures, over sequences seen; attention patterns as pictures; alerts; the summary.

    Never asks for a login and needs no account: where no API key is configured, or the server does
    not answer, the run is kept offline under ``FOLDER/wandb`` and ``wandb sync`` uploads it. A
    resumed run continues under the same id, and its steps go on where the killed process stopped.
    Read-only: the weights are the same with and without it.

    Keys are those of ``metrics.csv``, ``METRIC/LAYER:HEAD`` for a head and ``METRIC/max`` for the
    strongest. Pictures are ``attention``, and those of other callbacks under their names. Every member of
    several is a run of its own, with its own settings; those of a population are called ``CONDITION seed N`` and
    tagged with both, and a run of job type ``summary`` joins them when the population ends.

    Args:
        project: of the run.
        name: of the run; None for the name of the run folder. With several members, what their names begin with.
        group: of the run; several members are grouped under the name of their folder where it is None.
        tags: of the run.
        mode: None for what ``WANDB_MODE`` says, else online where an API key is configured
            (``WANDB_API_KEY`` or netrc), else offline.
        folder: where its files go; None for the run folder.
        pictures: attention patterns drawn per tenfold of optimizer steps, beside those at the start,
            at the end and at every phase change; each at the end of the Lightning batch that reaches it.
            0 for none at all.
    """

    def __init__(
        self,
        project: str = "opsin",
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        mode: Mode | None = None,
        folder: str | None = None,
        pictures: int = 3,
    ) -> None:
        if pictures < 0:
            raise ConfigError("WeightsAndBiases.pictures", pictures, "0 or more")
        self.project, self.name, self.group, self.tags = project, name, group, tags
        self.mode, self.folder, self.pictures = mode, folder, pictures
        self._runs: list[MemberRun] = []

    # ---- start ----------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mode = self.mode or default_mode()
        if mode == "disabled":
            return
        self._module = opsin_module(pl_module)
        self._taken: dict[str, int] = {}
        self._picture_times = log_spaced(trainer.max_steps, self.pictures) if self.pictures else set()
        self._picture_due = trainer.ckpt_path is None
        with unharmed():
            self._runs = self._start(trainer, mode)
            self._module.on_event(self._tell)

    def _start(self, trainer: Trainer, mode: Mode) -> list[MemberRun]:
        """A run for each member, or none at all."""
        module, keeper = self._module, keeper_of(trainer)
        files = Path(self.folder or run_folder(trainer)).absolute()
        members = about_members(module, keeper, self.name, self.group, self.tags or [])
        # runs may share a folder for W&B's files
        paths = ledger_paths(keeper.folder.absolute() if keeper else files, len(members))
        fingerprints = [fingerprint(about["config"]) for about in members]
        ledgers = open_ledgers(paths, files, fingerprints, from_checkpoint=trainer.ckpt_path is not None)
        abouts = [
            {"project": self.project, "id": ledger.id, **about} for ledger, about in zip(ledgers, members, strict=True)
        ]
        started = zip(start(mode, files, abouts), ledgers, strict=False)
        return [MemberRun(run, ledger, module.task.batch_size) for run, ledger in started]

    # ---- while it trains --------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._looked_until = trainer.global_step
        self._follow()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._follow()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._follow()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._picture_due = True
        self._follow()

    def _follow(self) -> None:
        """Take over what is new, and send the steps that can gain nothing more."""
        if not any(run.alive for run in self._runs):
            return
        self._collect()
        now = self._module.steps_done
        if self._picture_due or any(self._looked_until < time <= now for time in self._picture_times):
            self._draw(now, range(self._module.n_members))
            self._show(now, range(self._module.n_members))
        self._looked_until, self._picture_due = now, False
        # validation and pictures still add to the newest step
        for run in self._runs:
            run.send(before=now)

    def _collect(self) -> None:
        history = self._module.history
        for metric in history.names():
            series, taken = history[metric], self._taken.get(metric, 0)
            for step, values in zip(series.steps[taken:], series.values[taken:], strict=True):
                for run, own in zip(self._runs, values, strict=True):
                    run.add(step, scalars(metric, own))
            self._taken[metric] = len(series.steps)

    def _draw(self, step: int, members: Iterable[int]) -> None:
        """Add the attention of some members to a step that is not sent yet."""
        module = self._module
        drawn = [m for m in members if m < PICTURED_MEMBERS and self._runs[m].lacks("attention", step)]
        if not (self.pictures and drawn):
            return
        sites = [f"blocks.{layer}.attn.hook_pattern" for layer in range(module.sites.layers)]
        seen = module.observe(module.probe, sites)
        patterns = torch.stack([seen[site].mean(1) for site in sites], 1).float().cpu()
        induction = torch.stack([induction_strength(seen[site], module.probe.truth) for site in sites], 1).float().cpu()
        with unharmed():
            for member in drawn:
                picture = self._picture(patterns[member].numpy(), induction[member].numpy(), step)
                self._runs[member].add(step, {"attention": picture})

    def _show(self, step: int, members: Iterable[int]) -> None:
        """Add what other callbacks have last seen of some members to a step that is not sent yet."""
        from wandb import Image

        others = [callback for callback in callbacks_of(self._module.trainer) if isinstance(callback, Pictured)]
        drawn = [m for m in members if m < PICTURED_MEMBERS and self.pictures]
        for callback, member in product(others, drawn):
            run = self._runs[member]
            picture = callback.picture(member) if run.lacks(callback.name, step) else None
            if picture is not None:
                with unharmed():
                    run.add(step, {callback.name: Image(picture)})

    def _picture(self, patterns: np.ndarray, induction: np.ndarray, step: int) -> wandb.Image:
        from wandb import Image

        task = self._module.task
        title = f"Attention after step {step:,} ({step * task.batch_size:,} sequences)"
        figure = attention_figure(patterns, induction, position_names(task.layout), title)
        return Image(as_image(figure), caption=title)

    def _tell(self, event: Event) -> None:
        if self._runs and event.kind == PHASE_CHANGE:
            self._draw(self._module.steps_done, [event.member])
            self._show(self._module.steps_done, [event.member])
            self._runs[event.member].alert(event)

    # ---- end ----------------------------------------------------------------------------------------

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finish here and not in ``on_fit_end``, where other callbacks still complete the summary."""
        self._finish(interrupted=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._runs:
            self._collect()
        self._finish(interrupted=True)

    def _finish(self, interrupted: bool) -> None:
        for slot, run in enumerate(self._runs):
            run.finish(summary_of(self._module, slot), interrupted)
        self._runs = []


# ---- what is sent -----------------------------------------------------------------------------------


def ledger_paths(folder: Path, members: int) -> list[Path]:
    """``wandb_run.json``, and ``wandb_run_SLOT.json`` of each of several members."""
    return [folder / ("wandb_run.json" if members == 1 else f"wandb_run_{slot}.json") for slot in range(members)]


def fingerprint(config: Mapping[str, Any]) -> str:
    """Equal for configurations that train the same, wherever they write."""
    relevant = {name: value for name, value in config.items() if name not in ("run_folder", "ckpt_path")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()[:16]


def scalars(metric: str, values: np.ndarray) -> dict[str, float]:
    """One member's ``[]`` or ``[layers, heads]`` as one number per key: ``train/loss``, ``induction_strength/1:3``."""
    numbers = {number_name(metric, index): float(values[index]) for index in np.ndindex(values.shape)}
    if values.ndim:
        numbers[f"{metric}/max"] = float(values.max())
    return numbers
