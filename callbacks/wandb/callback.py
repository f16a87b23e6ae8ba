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
from lightning.pytorch import LightningModule, Trainer

from opsin.callbacks.readers.base import MOST_PER_DECADE, Reader, log_spaced
from opsin.callbacks.readers.heads import pattern_sites
from opsin.callbacks.readers.phase_change import PHASE_CHANGE
from opsin.callbacks.readers.run_folder import keeper_of, run_folder
from opsin.callbacks.wandb.member_run import MemberRun
from opsin.callbacks.wandb.members import about_members, summary_of
from opsin.callbacks.wandb.start import WandbMode, default_mode, has_agent, open_ledgers, start, unharmed
from opsin.errors import ConfigError, log
from opsin.figures.attention import attention_figure, position_names
from opsin.figures.style import PICTURED_MEMBERS, as_image
from opsin.metrics.heads import induction_strength
from opsin.records.axes import Axes, logged_numbers
from opsin.training.module import callbacks_of
from opsin.training.observers import Event, Pictured

if TYPE_CHECKING:
    import wandb


class WeightsAndBiases(Reader):
    """Everything a run measures, over sequences seen; attention patterns as pictures; alerts; the summary.

    Never asks for a login and needs no account: where no API key is configured, or the server does
    not answer, the run is kept offline under ``FOLDER/wandb`` and ``wandb sync`` uploads it. A
    resumed run continues under the same id, in a further file that begins after the last step that those before it
    hold: what a killed process left unwritten is sent again, except for rows of pictures alone. The run counts as
    finished once its W&B run has ended.
    Read-only: the weights are the same with and without it.

    Keys are those of ``metrics.csv``, ``METRIC/LAYER:HEAD`` for a head and ``METRIC/max`` for the
    strongest; of a metric with more than 64 other numbers, as of neurons or positions, ``METRIC/max`` and
    ``METRIC/mean`` alone. Pictures are ``attention``, and those of other callbacks under their names. Every member of
    several is a run of its own, with its own settings (but a sweep's agent has one run, which receives member 0 or the
    summary of the population); those of a population are called ``CONDITION seed N`` and
    tagged with both, and a run of job type ``summary`` joins them when the population ends.

    Args:
        project: W&B project that the run belongs to.
        name: name of the run, with several members the beginning of every name; None for that of the run folder.
        group: group of the run; None for no group, with several members for the name of the run folder.
        tags: tags of the run, before those that a population adds.
        mode: None for what ``WANDB_MODE`` says, else online where an API key is configured
            (``WANDB_API_KEY`` or netrc), else offline.
        folder: folder that receives the files of W&B; None for the run folder.
        pictures: attention patterns drawn per tenfold of optimizer steps, beside those at the start,
            at the end and at every phase change; each at the end of the Lightning batch that reaches it.
            0 for none at all.
    """

    folder_settings = ("folder",)

    def __init__(
        self,
        project: str = "opsin",
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        mode: WandbMode | None = None,
        folder: str | None = None,
        pictures: int = 3,
    ) -> None:
        if not 0 <= pictures <= MOST_PER_DECADE:
            raise ConfigError("WeightsAndBiases.pictures", pictures, f"0 or more, at most {MOST_PER_DECADE:,}")
        self.project, self.name, self.group, self.tags = project, name, group, tags
        self.mode, self.folder, self.pictures = mode, folder, pictures
        self._runs: list[MemberRun] = []

    # ---- start ----------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._runs, self._records_read = [], dict[str, int]()
        self._picture_times = log_spaced(trainer.max_steps, self.pictures) if self.pictures else set()
        self._picture_due = trainer.ckpt_path is None
        with unharmed():
            mode = self.mode or default_mode()
            if mode != "disabled":
                self._runs = self._start(trainer, mode)
                self._module.on_event(self._on_event)
                self._module.when_complete(lambda: self._finish(interrupted=False))

    def _start(self, trainer: Trainer, mode: WandbMode) -> list[MemberRun]:
        """A run for each member, or none at all."""
        module, keeper = self._module, keeper_of(trainer)
        # asked for in any case: nothing is written into the folder of another run
        kept = run_folder(trainer)
        files = Path(self.folder or kept).absolute()
        members = about_members(module, keeper, self.name, self.group, self.tags or [])
        # runs may share a folder for W&B's files
        paths = ledger_paths(keeper.folder.absolute() if keeper else files, len(members))
        fingerprints = [fingerprint(about["config"]) for about in members]
        ledgers = open_ledgers(paths, files, fingerprints, from_checkpoint=trainer.ckpt_path is not None)
        settings = [
            {"project": self.project, "id": ledger.id, **about} for ledger, about in zip(ledgers, members, strict=True)
        ]
        if has_agent() and len(settings) > 1:
            log.info("opsin: a sweep's agent has one run: it receives member 0; the others are in metrics.csv alone")
            settings = settings[:1]
        started = [*zip(start(mode, files, settings), ledgers, strict=False)]
        for run, ledger in started:
            ledger.note_start(run)
        return [MemberRun(run, ledger, module.task.batch_size, module.task.time_axis) for run, ledger in started]

    # ---- while it trains --------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_until = trainer.global_step
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
        if self._picture_due or any(self._drawn_until < time <= now for time in self._picture_times):
            self._draw(now, range(self._module.n_members))
            self._show(now, range(self._module.n_members))
        self._drawn_until, self._picture_due = now, False
        # validation and pictures still add to the newest step
        for run in self._runs:
            run.send(before=now)

    def _collect(self) -> None:
        history = self._module.history
        for metric in history.names():
            series, read = history[metric], self._records_read.get(metric, 0)
            for step, values in zip(series.steps[read:], series.values[read:], strict=True):
                for run, member_values in zip(self._runs, values, strict=False):
                    run.add(step, scalars(metric, history.axes(metric), member_values))
            self._records_read[metric] = len(series.steps)

    def _draw(self, step: int, members: Iterable[int]) -> None:
        """Add the attention of some members, where the model has any, to a step that is not sent yet."""
        module = self._module
        drawn = [m for m in self._pictured(members) if self._runs[m].lacks("attention", step)]
        sites = [site for site in pattern_sites(module.sites) if site in module.sites.sites]
        if not (drawn and sites):
            return
        seen = module.observe(module.probe, sites)
        patterns = torch.stack([seen[site].mean(1) for site in sites], 1).float().cpu()
        induction = torch.stack([induction_strength(seen[site], module.probe.truth) for site in sites], 1).float().cpu()
        with unharmed():
            for member in drawn:
                picture = self._picture(patterns[member].numpy(), induction[member].numpy(), step)
                self._runs[member].add(step, {"attention": picture})

    def _pictured(self, members: Iterable[int]) -> list[int]:
        """Those of some members that have a run and are drawn."""
        count = min(PICTURED_MEMBERS, len(self._runs)) if self.pictures else 0
        return [member for member in members if member < count]

    def _show(self, step: int, members: Iterable[int]) -> None:
        """Add the newest pictures that other callbacks have of some members to a step that is not sent yet."""
        from wandb import Image

        pictured = [callback for callback in callbacks_of(self._module.trainer) if isinstance(callback, Pictured)]
        drawn = self._pictured(members)
        for callback, member in product(pictured, drawn):
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

    def _on_event(self, event: Event) -> None:
        if event.member < len(self._runs) and event.kind == PHASE_CHANGE:
            self._draw(self._module.steps_done, [event.member])
            self._show(self._module.steps_done, [event.member])
            self._runs[event.member].alert(event)

    # ---- end ----------------------------------------------------------------------------------------

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the W&B runs that have not ended: of a run that is not trained, or that no ``KeepRun`` keeps."""
        if self._runs and not self._module.is_trained:
            # it was saved: when it goes on, the newest step may gain a validation, and is sent then
            self._collect()
            for run in self._runs:
                run.send(before=self._module.steps_done)
                run.forget_unsent()
            self._finish(interrupted=True)
        self._finish(interrupted=False)
        for run in self._runs:
            run.close()
        self._runs = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish(interrupted=True)
        self._runs = []

    def _finish(self, interrupted: bool) -> None:
        """End the W&B runs that have not ended, with all that there is of them."""
        if self._runs:
            self._collect()
        for slot, run in enumerate(self._runs):
            with unharmed():
                run.finish(summary_of(self._module, slot), interrupted)


# ---- what is sent -----------------------------------------------------------------------------------


def ledger_paths(folder: Path, members: int) -> list[Path]:
    """``wandb_run.json`` of a single run, and ``wandb_run_SLOT.json`` of every one of several members."""
    return [folder / ("wandb_run.json" if members == 1 else f"wandb_run_{slot}.json") for slot in range(members)]


def fingerprint(config: Mapping[str, Any]) -> str:
    """A hash that is equal for configurations that train alike, wherever they write."""
    relevant = {name: value for name, value in config.items() if name not in ("run_folder", "ckpt_path")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()[:16]


def scalars(metric: str, axes: Axes, values: np.ndarray | np.floating) -> dict[str, float]:
    """One member's values as one number per key (``train/loss``, ``induction_strength/1:3``), and the largest of many.

    Args:
        metric: name of the metric.
        axes: axes of the values, name to size.
        values: values of the member, with these axes.
    """
    largest = {f"{metric}/max": float(values.max())} if values.ndim else {}
    return largest | logged_numbers(metric, axes, values)
