"""The LightningModule: loss, optimizer, logging. It knows nothing of interpretability.

Legend: M members, S optimizer steps of one Lightning batch, R numbers that a step reports.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Self

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from opsin.errors import ConfigError, log
from opsin.interventions.apply import constants_of
from opsin.interventions.build_plan import Writer, build_plan
from opsin.interventions.check_gradient import check_gradients
from opsin.interventions.donors import Start, read_donor
from opsin.interventions.intervention import Intervention
from opsin.interventions.plan import Plan
from opsin.interventions.weights import WeightWriter
from opsin.model.memory import check_run_sizes
from opsin.model.parameters import Members
from opsin.model.protocol import Model, init_parameters
from opsin.model.saved import read_model, saved_model
from opsin.model.transformer import Transformer
from opsin.optimizers.adam import AdamW
from opsin.optimizers.base import Optimizer
from opsin.records.axes import Axes, logged_numbers
from opsin.records.checkpoint import SealedFiles, read_checkpoint, with_history
from opsin.records.events import EventTable
from opsin.records.history import History
from opsin.task import Batch, Task, drawn_steps
from opsin.training.active_members import ActiveMembers, members_in_step
from opsin.training.batch_counts import as_before_batch, validation_follows
from opsin.training.compiling import COMPILE_FROM_STEPS, choose_step, compiler_problem
from opsin.training.gates import GateController
from opsin.training.monitors import ValidationTimes, monitored_numbers, monitors, show_to_monitors
from opsin.training.objective import scored_logits, step_metrics
from opsin.training.observers import Event, Listener, Observation, recorded_metrics
from opsin.training.optimizers import (
    MemberOptimizer,
    build_scheduler,
    check_optimizer,
    check_scheduler,
    member_optimizer,
)
from opsin.training.probe import ForwardPasses
from opsin.training.run_settings import run_settings, surroundings
from opsin.training.same_run import apply_changes, check_same_run, identity_of_run, warn_of_surroundings
from opsin.training.settings import check_settings, refuse_uneven_checkpoints
from opsin.training.step import Step
from opsin.training.step_inputs import StepGates
from opsin.training.trainer_settings import check_trainer
from opsin.training.weight_updates import drawn_values

LONGEST_UNTRAINED = 1_000_000
"""Optimizer steps in which a schedule must act at least once where the Trainer trains none."""


class OpsinModule(pl.LightningModule):
    """Trains M transformers on one task, with whatever interventions the callbacks ask for.

    Args:
        task: what the members learn, with its data.
        transformer: shape of the model that every member has, where ``network`` names no other.
        seed: seeds initialisation and data; a list trains one member per seed.
        optimizer: what moves the weights, one of ``opsin.optimizers`` or of one's own, with all its settings; AdamW
            with the four settings below where it is None.
        learning_rate: step size of AdamW; a list has one for each member.
        weight_decay: decoupled weight decay of AdamW; a list has one for each member.
        gradient_clip: largest gradient norm of a member, whatever the optimizer; None for none.
        betas: decay of the two running moments of AdamW, in [0, 1).
        eps: what AdamW adds to the square root of the second moment.
        lr_scheduler: builds a scheduler from the optimizer; stepped after every optimizer step, a
            plateau scheduler (of a single member) once a Lightning batch with the mean training loss.
        steps_per_batch: optimizer steps that one Lightning batch carries.
        log_every: optimizer steps over which one logged training value is averaged; divides
            ``steps_per_batch``.
        probe_size: sequences of the probe that trackers measure on, the first of its evaluation set; all of a smaller
            set of a fixed size.
        evaluation_size: sequences of each evaluation set that is drawn; one of a fixed size is evaluated whole.
        compile: fuse the whole step into one compiled graph; ``auto`` does so when a compiler is
            present and the run has at least 5,000 optimizer steps.
        threads: threads of this process; small models want one.
        idle: what happens when a writer was active and never changed an activation.
        network: model that every member has, in place of ``transformer``: any subclass of ``Model``.
        initial: for each member, whose weights it starts from; its own initialisation where None.
        probe: evaluation set of the task that the probe is taken from; ``train`` where None.
    """

    def __init__(
        self,
        task: Task,
        transformer: Transformer = Transformer(),  # noqa: B008 - frozen
        seed: int | list[int] = 0,
        learning_rate: float | list[float] = 1e-3,
        weight_decay: float | list[float] = 0.0,
        gradient_clip: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        lr_scheduler: LRSchedulerCallable | None = None,
        steps_per_batch: int = 50,
        log_every: int = 10,
        probe_size: int = 128,
        evaluation_size: int = 512,
        compile: Literal["auto"] | bool = "auto",
        threads: int = 1,
        idle: Literal["stop", "warn"] = "stop",
        initial: list[Start | None] | None = None,
        optimizer: Optimizer | None = None,
        network: Model | None = None,
        probe: str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.task, self.network = task, chosen_model(transformer, network)
        self.seeds = [seed] if isinstance(seed, int) else list(seed)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.gradient_clip, self.betas, self.eps = gradient_clip, betas, eps
        self.has_short_form = optimizer is None
        self.lr_scheduler = lr_scheduler
        self.steps_per_batch, self.log_every = steps_per_batch, log_every
        self.probe_set, self.probe_size, self.evaluation_size = probe, probe_size, evaluation_size
        self.compile_setting, self.threads, self.idle = compile, threads, idle
        check_settings(self)
        self.optimizer = AdamW(learning_rate, weight_decay, betas, eps) if optimizer is None else optimizer
        check_optimizer(self.optimizer, len(self.seeds))
        sets = {
            "probe_size": self._probe_sequences(),
            "evaluation_size": max(map(self._set_sequences, task.evaluations)),
        }
        check_run_sizes(self.network, task, len(self.seeds), sets, self.optimizer)
        self.sites = self.network.sites(task)
        self.initial_weights: list[str | None] = []
        self.members = Members(self._first_weights(initial), self.sites.weights.untrained)
        self._begin_without_records()

    def _begin_without_records(self) -> None:
        self.history = History(self.task.batch_size)
        self.events: list[Event] = []
        self.event_table: EventTable | None = None
        self.ended: dict[int, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {}
        self._saved_gates: dict[str, Any] | None = None
        self._steps_before = 0
        self._monitored: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.settings: dict[str, Any] = {}
        self.allow: Sequence[str] = ()
        self.allowed: list[dict[str, Any]] = []
        self._compiled = False
        self._surroundings_before: tuple[Mapping[str, Any], int] | None = None
        self._drop_handlers()

    def _drop_handlers(self) -> None:
        """Begin with nobody to call, and without results of a batch."""
        self._listeners: list[Listener] = []
        self._event_handlers: list[Callable[[Event], None]] = []
        self._batch_handlers: list[Callable[[], None]] = []
        self._completion_handlers: list[Callable[[], None]] = []
        self._end_requests: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._results: list[Tensor] = []
        self._end_wanted = False

    def _first_weights(self, initial: list[Start | None] | None) -> dict[str, Tensor]:
        values = init_parameters(self.network, self.task, self.seeds)
        for member, start in enumerate(initial or ()):
            if start is None:
                self.initial_weights.append(None)
            else:
                donor = read_donor("model.initial", start.path, start.place)
                if donor.model != self.network:
                    raise ConfigError("model.initial", f"{start.path} of {donor.model}", f"a {self.network}")
                donor.check(self.task)
                self.initial_weights.append(donor.digest)
                for name, value in values.items():
                    value[member] = donor.parameters[name][0]
        return values

    # ---- what callbacks use -------------------------------------------------------------------

    @property
    def n_members(self) -> int:
        """M."""
        return len(self.seeds)

    @cached_property
    def step_metrics(self) -> tuple[str, ...]:
        """Metrics that are recorded of every training step, in the order of its results."""
        return step_metrics(self.task)

    @property
    def steps_done(self) -> int:
        """Optimizer steps finished; equals the Trainer's ``global_step``, but for one that does not train."""
        done = self.trainer.global_step
        return done if self._is_fitting else max(done, self._steps_before)

    @property
    def _is_fitting(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING

    def listen(self, every: int, notify: Callable[[Observation], None], sites: Sequence[str] = ()) -> None:
        """Call ``notify`` after every ``every`` optimizer steps, before the first and after the last.

        Args:
            sites: activations to show it on the probe; listeners of one step share one forward pass.

        Raises:
            ConfigError: an unknown site.
        """
        names = tuple(self.sites.find(site, "sites").name for site in sites)
        self._listeners.append(Listener(every, names, notify))

    def record(self, step: int, metrics: Mapping[str, Float[Tensor, "M ..."]]) -> None:
        """Record values in the history, and hand them to the Trainer's loggers under the step they belong to.

        Args:
            step: optimizer steps finished when the values were measured.
            metrics: values ``[M]``, or ``[M, ...]`` with the axes that were declared, by name; loggers receive heads
                as ``METRIC/LAYER:HEAD``, and ``METRIC/max`` and ``METRIC/mean`` of a metric with many other numbers.
        """
        for metric, values in metrics.items():
            self.history.record(metric, step, values)
        show_to_monitors(self.trainer, self._monitored, metrics)
        if self.trainer.loggers:
            axes = {metric: self.history.axes(metric) for metric in metrics}
            numbers = {**_logged(metrics, axes), "sequences": step * self.task.batch_size}
            for logger in self.trainer.loggers:
                logger.log_metrics(numbers, step=step)

    def on_event(self, handler: Callable[[Event], None]) -> None:
        """Call ``handler`` with every event announced from now on."""
        self._event_handlers.append(handler)

    def after_batch(self, handler: Callable[[], None]) -> None:
        """Call ``handler`` at the end of every Lightning batch, after all callbacks and the validation that follows."""
        self._batch_handlers.append(handler)

    def end_when(self, requested: Callable[[], bool], end: Callable[[], None]) -> None:
        """Ask before every optimizer step whether the run is to end, and let it be saved and ended there.

        A checkpoint that is saved then resumes within the Lightning batch: to the last bit what would have been.

        Args:
            requested: function that says whether the run is to end now; quick, as it is called before every step.
            end: function that saves the run and ends it, by an exception.
        """
        self._end_requests.append((requested, end))

    def when_complete(self, handler: Callable[[], None]) -> None:
        """Call ``handler`` when the run's summary is whole, before a checkpoint says that the run is finished."""
        self._completion_handlers.append(handler)

    @property
    def is_trained(self) -> bool:
        """Whether training has come to its end: the last step, the end of every member, or an early stopping's word."""
        stopped = any(
            isinstance(callback, EarlyStopping) and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED
            for callback in callbacks_of(self.trainer)
        )
        return stopped or self.steps_done >= self.trainer.max_steps or len(self.ended) == self.n_members

    def announce(self, event: Event) -> None:
        """Add an event to the run, and call every handler with it."""
        self.events.append(event)
        if self.event_table is not None:
            self.event_table.append(vars(event))
        for handler in self._event_handlers:
            handler(event)

    def announce_completion(self) -> None:
        """Call every handler that waits for the whole of the run; nobody goes on with it once it is finished."""
        for handler in self._completion_handlers:
            handler()

    def parameters_by_name(self) -> dict[str, Tensor]:
        """Parameters ``[M, ...]`` under their names."""
        return dict(self.members.named_parameters())

    def trained_parameters(self) -> list[tuple[str, Tensor]]:
        """Names and tensors ``[M, ...]`` of the parameters that the optimizer moves."""
        return [(name, parameter) for name, parameter in self.members.named_parameters() if parameter.requires_grad]

    # ---- set-up -------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[pl.Callback]:
        """None; this is the first hook of a run, before Lightning joins processes, so settings are refused here."""
        if self._is_fitting:
            check_trainer(self.trainer)
        return []

    def setup(self, stage: str) -> None:
        # plugins that the user has chosen stay
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = SealedFiles()
        # a run is one process; in a cluster's job Lightning's loggers would write in the first task alone
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
        if stage == "validate":
            self._set_up_validation()
        if stage != "fit":
            return
        trainer = self.trainer
        if trainer.max_steps < 1:
            raise ConfigError("trainer.max_steps", trainer.max_steps, "the number of optimizer steps")
        if self.compile_setting is True and (problem := compiler_problem()):
            raise ConfigError("model.compile", True, f"false, or a C++ compiler on the path that works ({problem})")
        refuse_uneven_checkpoints(trainer, self.steps_per_batch)
        torch.set_num_threads(self.threads)
        self._saved_gates = None
        self._drop_handlers()
        self._drop_passes()
        if trainer.global_step == 0:
            self._forget_earlier_run()
        self.ended.clear()
        self.plan = self.plan_for(callbacks_of(trainer), trainer.max_steps)
        recorded = recorded_metrics(callbacks_of(trainer), self.sites, self.task, bool(trainer.limit_val_batches))
        for metric, axes in recorded.items():
            self.history.declare(metric, axes)
        self._check_followers(recorded)
        self.settings, self.allowed = run_settings(self, self.plan, trainer), []
        self._surroundings_before = None
        self.step = Step(self.network, self.task, self.plan, self.optimizer)

    def _check_followers(self, recorded: Mapping[str, Axes]) -> None:
        """Refuse schedules and callbacks that follow what the run does not record, and limits of nothing."""
        trainer, callbacks = self.trainer, callbacks_of(self.trainer)
        times = ValidationTimes(trainer, self.task, self.steps_per_batch)
        times.check()
        self._monitored = {}
        if not (self.plan.feedback or monitors(callbacks)):
            return
        if self.plan.feedback:
            self.plan.check_feedback(recorded)
        self._monitored = monitored_numbers(callbacks, recorded, times, type(self) is not OpsinModule)

    def _forget_earlier_run(self) -> None:
        """Begin without the records of another run of this module; one that resumes loads its own afterwards."""
        if self.history.names():
            log.warning("opsin: the module was trained before; the run begins from its weights as they are")
        self.history, self.events, self.event_table = History(self.task.batch_size), [], None
        self.summary.clear()

    def _set_up_validation(self) -> None:
        """Plan what the Trainer's writers do; what a run before this has counted stays where they are its own."""
        steps = self.trainer.max_steps if self.trainer.max_steps > 0 else LONGEST_UNTRAINED
        plan = self.plan_for(callbacks_of(self.trainer), steps)
        if getattr(self, "plan", None) is None or plan.digest() != self.plan.digest():
            self.plan = plan
            self._drop_passes()

    def _drop_passes(self) -> None:
        """Let the next start build its forward passes anew."""
        for name in ("constants", "gates", "forward_passes"):
            self.__dict__.pop(name, None)

    def plan_for(self, callbacks: Sequence[pl.Callback], steps: int) -> Plan:
        """What those among the callbacks that are writers do in a run of so many steps."""
        writers = [callback for callback in callbacks if isinstance(callback, (Writer, WeightWriter))]
        plan = build_plan(writers, self.sites, self.n_members, steps, self.task.batch_size)
        plan.check_task(self.task)
        check_gradients(plan, self.sites, self.parameters_by_name(), self.task)
        return plan

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = member_optimizer(self.trained_parameters(), self.optimizer, self.gradient_clip)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = build_scheduler(self.lr_scheduler, optimizer)
        check_scheduler(scheduler, self.n_members)
        return [optimizer], [scheduler]

    def train_dataloader(self) -> DataLoader:
        """Numbers of Lightning batches; the data of a step is made from (seed, step) when it is needed."""
        return _numbers(-(-self.trainer.max_steps // self.steps_per_batch) + 1)

    def val_dataloader(self) -> DataLoader:
        """Numbers of the task's evaluation sets."""
        return _numbers(len(self.task.evaluations))

    def on_fit_start(self) -> None:
        self._build_passes()
        self.probe = self.forward_passes.evaluation_set(self.probe_set or "train", self._probe_sequences())
        run_step = choose_step(self.step, self.compile_setting, self.trainer.max_steps)
        self._compiled = run_step is not self.step
        if self._surroundings_before is not None:
            before, step = self._surroundings_before
            warn_of_surroundings(before, surroundings(self, self._compiled), step)
        self._active_members = ActiveMembers(run_step, self.n_members)
        # a graph for fewer members must repay its making, as the first must
        self._last_leave = self.trainer.max_steps - (0 if run_step is self.step else COMPILE_FROM_STEPS)

    def _build_passes(self) -> None:
        """Build what forward passes need, in the type and on the device that the parameters have now."""
        dtype = next(self.members.parameters()).dtype
        table = self.network.position_table(self.task.layout.positions, dtype).to(self.device)
        drawn = drawn_values(self.plan.changes, self.network, self.task, self.seeds)
        untrained = {name: self.parameters_by_name()[name].detach() for name in self.sites.weights.untrained}
        self.constants = constants_of(self.plan, self.task.bank(), table, self.n_members, dtype, drawn, untrained)
        self.gates = GateController(
            self.plan, self.constants, self.seeds, self.history, self.idle, self.announce, self.ended
        )
        if self._saved_gates is not None:
            self.gates.load_state_dict(self._saved_gates)
        self.forward_passes = ForwardPasses(
            self.network,
            self.task,
            self.plan,
            self.constants,
            self.gates,
            self.parameters_by_name,
            lambda: self.steps_done,
        )

    # ---- training -----------------------------------------------------------------------------

    def on_train_start(self) -> None:
        # a resumed run shows what it recorded last before it was killed
        last = {
            metric: self.history[metric].values[-1] for metric, _ in self._monitored.values() if metric in self.history
        }
        show_to_monitors(
            self.trainer, self._monitored, {name: torch.from_numpy(values) for name, values in last.items()}
        )
        if self.steps_done == 0:
            self._notify(0, self._listeners)

    def training_step(self, batch: int, batch_idx: int) -> None:
        # a run that ended within a batch has results of it already
        results, begin = self._results, self.steps_done
        first = begin - len(results)
        count = min(self.steps_per_batch, self.trainer.max_steps - first) - len(results)
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        self._active_members.choose(members_in_step(self.n_members, self.ended, self._last_leave))
        draws = drawn_steps(self.task, self.seeds, begin, count)
        gates = self.gates.during(begin, count, within_batch=bool(results))
        for done in range(begin + 1, begin + count + 1):
            self._end_if_requested()
            draw = {name: tensor.to(self.device) for name, tensor in next(draws).items()}
            optimizer.step(partial(self._update, draw, next(gates), results))
            self._step_schedulers()
            self._log_steps(done, results)
            last = done == self.trainer.max_steps
            self._notify(done, [listener for listener in self._listeners if last or done % listener.every == 0])
        self._active_members.write_back()
        if self.steps_done < self.trainer.max_steps:
            self._end_if_requested()
        self._finish_batch(first, torch.stack(results))
        self._results = []
        self.gates.check_idle(finished=self.steps_done == self.trainer.max_steps)

    def on_train_batch_end(self, *_: Any) -> None:
        # Lightning's callbacks have been told by now, so whoever ends a member has ended it
        if len(self.ended) == self.n_members and self.steps_done < self.trainer.max_steps:
            # listeners whose turn it was have been notified already
            done = self.steps_done
            self._notify(done, [listener for listener in self._listeners if done % listener.every])
            self.gates.check_idle(finished=True)

        self._note_undecided_end()
        if not validation_follows(self.trainer):
            self._end_batch()

    def on_validation_end(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._note_undecided_end()
            self._end_batch()

    def _note_undecided_end(self) -> None:
        """Where the Trainer ends a run that is not trained (``max_time``), end it as a request would."""
        # an end as the Trainer has it begins with a validation that the run would not have here
        if self._end_requests and self.trainer.should_stop and not self.is_trained:
            self._end_wanted, self.trainer.should_stop = self.trainer.fit_loop._can_stop_early, False

    def _end_batch(self) -> None:
        for handler in self._batch_handlers:
            handler()

    def _end_if_requested(self) -> None:
        for requested, end in self._end_requests:
            if self._end_wanted or requested():
                self._active_members.write_back()
                with as_before_batch(self.trainer):
                    end()

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            self._steps_before = self.trainer.global_step

    def on_fit_end(self) -> None:
        # once its callbacks have written what there is
        if problem := self.gates.all_diverged():
            raise problem

    def _update(self, draw: dict[str, Tensor], gates: StepGates, results: list[Tensor]) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, MemberOptimizer)
        state, hyper = optimizer.members_state(), optimizer.hyper()
        results.append(self._active_members(state, hyper, self.constants, draw, gates, self.gates.counts))

    def _step_schedulers(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if not isinstance(config.scheduler, ReduceLROnPlateau):
                config.scheduler.step()

    def _log_steps(self, done: int, results: list[Tensor]) -> None:
        if done % self.log_every and done != self.trainer.max_steps:
            return
        window = (done - 1) % self.log_every + 1
        means = torch.stack(results[-window:]).mean(0)
        self.record(done, dict(zip(self.step_metrics, means, strict=True)))

    def _finish_batch(self, first: int, results: Float[Tensor, "S R M"]) -> None:
        self.gates.check_diverged(first, results[:, 0].isfinite())
        self.trainer.should_stop |= self.gates.all_diverged() is not None
        means = results.nanmean((0, 2))
        for name, value in zip(self.step_metrics, means, strict=True):
            self.log(name, value, logger=False, batch_size=1)
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                config.scheduler.step(float(means[0]))
        # Lightning counts one optimizer step a batch where it labels what it logs itself
        self.trainer.fit_loop.epoch_loop._batches_that_stepped += len(results) - 1

    # ---- what readers see -----------------------------------------------------------------------

    def _notify(self, done: int, due: Sequence[Listener]) -> None:
        if not due:
            return
        self._active_members.write_back()
        sites = {site for listener in due for site in listener.sites}
        activations = self.observe(self.probe, sites) if sites else {}
        observation = Observation(done, self.probe, activations)
        for listener in due:
            listener.notify(observation)

    def observe(
        self, batch: Batch, sites: Collection[str], without: Collection[Intervention] = ()
    ) -> dict[str, Tensor]:
        """Activations ``[M, B, ...]`` on a batch, under the interventions (but some) as they stood at the last step.

        Args:
            batch: sequences that the model sees.
            sites: names of the activations; the forward pass ends where the last of them has been computed.
            without: interventions of the run's own pass that are switched off.
        """
        return self.forward_passes.observe(batch, sites, without)

    def evaluation_set(self, name: str) -> Batch:
        """The sequences of one of the task's evaluation sets, those that validation sees."""
        return self.forward_passes.evaluation_set(name, self._set_sequences(name))

    def _set_sequences(self, name: str) -> int:
        """Sequences of an evaluation set: all of one that has a fixed number of them."""
        return self.task.set_size(f"eval/{name}") or self.evaluation_size

    def _probe_sequences(self) -> int:
        return min(self.probe_size, self.task.set_size(f"eval/{self.probe_set or 'train'}") or self.probe_size)

    def on_validation_start(self) -> None:
        if self._is_fitting:
            return
        built = getattr(self, "constants", None)
        if built is None or (built.table.device, built.table.dtype) != (self.device, self.dtype):
            if self.plan.supplies and self._saved_gates is None:
                expected = "ckpt_path of a run with these writers: they take over what the run has computed"
                raise ConfigError("Trainer.validate", ", ".join(row.name for row in self.plan.rows), expected)
            with torch.inference_mode(False):
                self._build_passes()

    def validation_step(self, batch: int, batch_idx: int) -> None:
        name = self.task.evaluations[int(batch)]
        data = self.evaluation_set(name)
        logits = scored_logits(self.observe(data, ["hook_logits"])["hook_logits"], data)
        measured = self.task.objective.measured(logits, data)
        metrics = {f"val/{name}/{metric}": values for metric, values in measured.items()}
        for metric, values in metrics.items():
            self.log(metric, values.mean(), logger=not self._is_fitting, batch_size=1)
        if self._is_fitting and not self.trainer.sanity_checking:
            self.record(self.steps_done, metrics)

    # ---- checkpoints ----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # a callback may save before the run begins
        if "gates" not in self.__dict__:
            self._build_passes()
        checkpoint["opsin"] = {
            **self.history.for_checkpoint(),
            "events": self._events_for_checkpoint(),
            "plan": self.plan.digest(),
            "control": self.gates.state_dict(),
            "seeds": self.seeds,
            **saved_model(self.network, self.task),
            "run": self.run_identity(),
        }
        if self._results:
            checkpoint["opsin"]["batch"] = torch.stack(self._results).cpu()

    def _events_for_checkpoint(self) -> int | list[dict[str, Any]]:
        """The events, or their number where a file has them."""
        if self.event_table is None:
            return [vars(event) for event in self.events]
        self.event_table.sync()
        return len(self.events)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # without a Trainer the weights alone are wanted
        if self._trainer is None:
            return
        path = Path(str(self.trainer.ckpt_path))
        saved = with_history(checkpoint, path)["opsin"]
        self._steps_before = checkpoint["global_step"]
        if self._is_fitting:
            self._check_same_run(checkpoint, path)
        self.history.restore(saved)
        self.events = [Event(**event) for event in saved["events"]]
        # whoever validates may do so under other interventions
        self._saved_gates = saved["control"] if saved["plan"] == self.plan.digest() else None
        self._results = [*saved["batch"].to(self.device)] if "batch" in saved else []
        self._drop_passes()

    def run_identity(self) -> dict[str, Any]:
        """What a checkpoint says of its run: digest, named settings, surroundings, and changes that were allowed."""
        return identity_of_run(self.settings, surroundings(self, self._compiled), self.allowed)

    def _check_same_run(self, checkpoint: dict[str, Any], path: Path) -> None:
        saved, step = checkpoint["opsin"], checkpoint["global_step"]
        if "run" not in saved:
            log.warning(f"opsin: {path} is of an earlier version: whether it is whole, and of this run, is not checked")
        elif changes := check_same_run(saved["run"]["settings"], self.settings, self.allow, step):
            apply_changes(checkpoint, self, changes)
            self.allowed = [*saved["run"]["allowed"], *changes]
        else:
            self.allowed = list(saved["run"]["allowed"])
        if saved["plan"] != self.plan.digest():
            raise ConfigError(
                "ckpt_path", saved["plan"], f"a run with this plan of interventions, {self.plan.digest()}"
            )
        self._surroundings_before = (saved["run"]["surroundings"], step) if "run" in saved else None

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *arguments: Any, **settings: Any) -> Self:  # type: ignore[override]
        """A module with the weights of a checkpoint, on the CPU; seeds and shape are the checkpoint's where not given.

        Args:
            checkpoint_path: path of a checkpoint, for example ``RUN/checkpoints/last.ckpt``.
            arguments: what Lightning's method of this name takes beside the path.
            settings: settings of the module, ``task`` among them; others have their defaults.

        Raises:
            ConfigError: a file that is damaged, or no checkpoint of a run.
        """
        saved = read_checkpoint(Path(checkpoint_path), "checkpoint_path")["opsin"]
        known = {"seed": saved["seeds"], "weights_only": True}
        if "transformer" not in settings:
            known["network"] = read_model(saved)
        load = super().load_from_checkpoint
        return load(checkpoint_path, *arguments, **{**known, **settings})


def chosen_model(transformer: Transformer, network: Model | None) -> Model:
    """The model of a run, of the two settings that name one.

    Args:
        transformer: short form, which has a default.
        network: any model; None for the short form.

    Raises:
        ConfigError: both are given.
    """
    if network is None:
        return transformer
    if transformer != Transformer():
        raise ConfigError("model.transformer", transformer.in_words(), "nothing beside model.network, which is used")
    return network


def _numbers(count: int) -> DataLoader:
    """0, 1, ... ``count`` - 1, one at a time."""
    # a loader without a generator of its own draws from the global one
    return DataLoader(range(count), batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]


def _logged(metrics: Mapping[str, Float[Tensor, "M ..."]], axes: Mapping[str, Axes]) -> dict[str, float]:
    """One number per key; those of several members end in ``/member_0``, ``/member_1``, ..."""
    numbers: dict[str, float] = {}
    for metric, values in metrics.items():
        suffixes = [""] if len(values) == 1 else [f"/member_{member}" for member in range(len(values))]
        for suffix, member_values in zip(suffixes, values.detach().cpu().numpy(), strict=True):
            found = logged_numbers(metric, axes[metric], member_values)
            numbers |= {name + suffix: value for name, value in found.items()}
    return numbers


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The Trainer's callbacks, in the order they are called."""
    return trainer.callbacks  # type: ignore[attr-defined]


def opsin_module(module: pl.LightningModule) -> OpsinModule:
    """The module a callback was attached to, as what callbacks of this package need.

    Raises:
        ConfigError: some other LightningModule.
    """
    if not isinstance(module, OpsinModule):
        raise ConfigError("model", type(module).__name__, "an OpsinModule")
    return module
