"""Small things with known answers, shared by the tests."""

import importlib.util
import sys
from dataclasses import replace

import lightning.pytorch as pl
import torch

from opsin.interventions.apply import PassInputs, constants_of, run_passes
from opsin.interventions.build_plan import build_plan
from opsin.model.protocol import init_parameters
from opsin.model.transformer import Transformer
from opsin.objective import cross_entropy
from opsin.optimizers import AdamW
from opsin.records.history import History
from opsin.task import Batch, Layout, Task, Truth
from opsin.tasks import FewShot, GaussianClusters
from opsin.training.module import OpsinModule
from opsin.training.objective import scored_logits
from opsin.training.optimizers import member_optimizer
from opsin.training.step import Step
from opsin.training.step_inputs import StepCounts, StepGates
from opsin.training.weight_updates import drawn_values, no_skipped_updates
from tests.helpers.paths import ROOT

SMALL = Transformer(layers=2, width=8, heads=2)
BETAS, EPS = (0.9, 0.999), 1e-8


def few_shot(**options):
    """A few-shot task small enough for loops in Python."""
    source = GaussianClusters(classes=12, exemplars=2, features=8)
    return FewShot(**{"exemplars": source, "batch_size": 4, "train_classes": 8} | options)


class ToyTokens(Task):
    """Three different tokens, and the same three again: a b c a b c. The second half is predicted."""

    batch_size, n_features, n_tokens, n_outputs, evaluations = 4, None, 7, 7, ("train",)
    layout = Layout(features=(), tokens=tuple(range(6)), labels=(1, 2, 3), scored=(3, 4))

    def bank(self):
        return {}

    def draw(self, seeds, first, count, split="train", batch_size=None):
        def one(seed, step):
            generator = torch.Generator().manual_seed(1000 * seed + step + (split != "train") * 10**9)
            return torch.rand(batch_size or self.batch_size, self.n_tokens, generator=generator).argsort(-1)[:, :3]

        return {"half": torch.stack([torch.stack([one(seed, first + s) for seed in seeds]) for s in range(count)])}

    def assemble(self, bank, draw):
        tokens = torch.cat([draw["half"], draw["half"]], -1)
        position = torch.arange(6)
        labels = (position >= 1) & (position <= 3)
        query = ((position == 3) | (position == 4)).expand(*tokens.shape)
        match = query[..., None] & (position == position[:, None] - 2)
        truth = Truth((position - 1).clamp(min=0), labels, query, match, query[..., None] & labels & ~match)
        return Batch(None, tokens, tokens[..., 4:], None, truth, self.layout)

    def baselines(self):
        return {"uniform": 1.9459101490553132}


def batch_of(task, seeds=(0, 1), step=0, dtype=torch.float32):
    """One batch, a member per seed."""
    draw = {name: tensor[0] for name, tensor in task.draw(list(seeds), step, 1).items()}
    return task.assemble({name: tensor.to(dtype) for name, tensor in task.bank().items()}, draw)


def hand_batch(classes, labels, answers, features=None):
    """Few-shot sequences written by hand (M = 1): classes ``[B, C + 1]``, labels ``[B, C]``, answers ``[B]``."""
    task = few_shot(n_labels=4, context=len(labels[0]))
    features = torch.eye(8) if features is None else torch.tensor(features)
    classes, answers = torch.tensor([classes]), torch.tensor([answers])
    shown = torch.cat([torch.tensor([labels]), answers[..., None].clamp(min=0)], -1)
    draw = {"classes": classes, "exemplars": torch.zeros_like(classes), "labels": shown, "answers": answers}
    return task.assemble({"exemplars": features[:, None].double()}, draw)


def weights(model, task, seeds=(0, 1), dtype=torch.float64):
    """Parameters with no zeros and ones left, so that every bias and norm matters."""
    generator = torch.Generator().manual_seed(sum(seeds))
    values = {name: value.to(dtype) for name, value in init_parameters(model, task, seeds).items()}
    return {n: v + 0.1 * torch.randn(v.shape, generator=generator, dtype=dtype) for n, v in values.items()}


def run(model, parameters, batch, tap=None):
    """Logits, and all activations as they go on after the tap, in order of computation."""
    seen = {}

    def recording(name, activation):
        assert name not in seen, f"{name} is tapped twice"
        seen[name] = tap(name, activation) if tap else activation
        return seen[name]

    table = model.position_table(batch.layout.positions, next(iter(parameters.values())).dtype)
    return model.forward(parameters, table, batch, recording), seen


def plan_of(model, task, *writers, members=2, steps=10):
    """The plan of these writers."""
    return build_plan(writers, model.sites(task), members, steps, task.batch_size)


def tap_of(model, task, batch, *writers, gate=1.0, members=2, dtype=torch.float64):
    """The tap of these writers, all at the same strength."""
    plan = plan_of(model, task, *writers, members=members)
    return run_passes(plan, inputs_of(plan, model, {}, batch, gate, dtype))


def inputs_of(plan, model, values, batch, gate=1.0, dtype=torch.float64):
    """The inputs of a pass on one batch, every intervention at the same strength, at step 0 of seeds 0, 1, ..."""
    members = len(batch.tokens)
    constants = constants_of(plan, {}, model.position_table(batch.layout.positions, dtype), members, dtype)
    clock = torch.stack([torch.arange(members), torch.zeros(members, dtype=torch.int64)], 1)
    gates = torch.full((len(plan.rows), members), gate, dtype=dtype)
    return PassInputs(model, values, constants, batch, gates, clock)


def losses(model, parameters, batch, tap=None):
    """Mean loss of every member."""
    return cross_entropy(scored_logits(run(model, parameters, batch, tap)[0], batch), batch).mean((1, 2))


class ToySums(ToyTokens):
    """Four tokens of three; predicted, at the last alone, is the sum of the first two modulo three."""

    n_tokens = n_outputs = 3
    layout = Layout(features=(), tokens=tuple(range(4)), labels=(1, 2), scored=(3,))

    def draw(self, seeds, first, count, split="train", batch_size=None):
        def one(seed, step):
            generator = torch.Generator().manual_seed(1000 * seed + step + (split != "train") * 10**9)
            return torch.randint(3, (batch_size or self.batch_size, 4), generator=generator)

        return {"tokens": torch.stack([torch.stack([one(seed, first + s) for seed in seeds]) for s in range(count)])}

    def assemble(self, bank, draw):
        tokens = draw["tokens"]
        position = torch.arange(4)
        labels = (position == 1) | (position == 2)
        query = (position == 3).expand(*tokens.shape)
        match = query[..., None] & (position == 1)
        truth = Truth((position - 1).clamp(min=0), labels, query, match, query[..., None] & labels & ~match)
        return Batch(None, tokens, tokens[..., :2].sum(-1, keepdim=True) % 3, None, truth, self.layout)


class Training:
    """A run without a Trainer: the step, its optimizer, and the data of each step."""

    def __init__(
        self,
        model,
        task,
        values,
        *writers,
        rate=1e-2,
        decay=0.0,
        clip=None,
        seeds=(0, 1),
        steps=100,
        optimizer=None,
    ):
        dtype = next(iter(values.values())).dtype
        self.task, self.seeds, self.dtype = task, list(seeds), dtype
        stay = {name: values[name] for name in model.parameters(task).untrained}
        leaves = [(name, x.detach().clone().requires_grad_()) for name, x in values.items() if name not in stay]
        part = AdamW(rate, decay, BETAS, EPS) if optimizer is None else optimizer
        self.optimizer = member_optimizer(leaves, part, clip)
        plan = plan_of(model, task, *writers, members=len(seeds), steps=steps)
        self.step = self.call = Step(model, task, plan, part)
        bank = {name: tensor.to(dtype) for name, tensor in task.bank().items()}
        table = model.position_table(task.layout.positions, dtype)
        fresh = drawn_values(plan.changes, model, task, self.seeds)
        self.constants = constants_of(plan, bank, table, len(seeds), dtype, fresh, stay)
        gates = plan.gates(0, steps, len(seeds), History(task.batch_size))
        self.gates = torch.from_numpy(gates).to(dtype)
        skipped = {name: zeros.to(dtype) for name, zeros in no_skipped_updates(plan.changes, len(seeds)).items()}
        fired = torch.zeros(len(plan.rows), len(seeds), dtype=torch.int64)
        self.counts = StepCounts(fired, torch.ones(len(seeds), dtype=torch.bool), skipped)

    def update(self, k, **hyper):
        """Step k; hyper-parameters may be overridden."""
        draw = {name: tensor[0] for name, tensor in self.task.draw(self.seeds, k, 1).items()}
        state, settings = self.optimizer.members_state(), self.optimizer.hyper()
        clip = hyper.pop("clip", settings.clip)
        settings = replace(settings, clip=clip, values={**settings.values, **hyper})
        clock = torch.tensor([[seed, k] for seed in self.seeds])
        gates = StepGates(self.gates[k], clock)
        return self.optimizer.step(lambda: self.call(state, settings, self.constants, draw, gates, self.counts))

    def kept(self, name):
        """One tensor of the optimizer's state of every parameter, by the parameter's name."""
        state = self.optimizer.members_state()
        return {parameter: kept[name] for parameter, kept in zip(state.names, state.kept, strict=True)}

    @property
    def values(self):
        return dict(zip(self.optimizer.names, self.optimizer.parameters, strict=True))


def script(name):
    """The module of a file in scripts/."""
    path = ROOT / "scripts" / f"{name}.py"
    # where a script that is run finds its neighbours
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", path)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def train(module: OpsinModule, steps: int, *callbacks: pl.Callback, resume: str | None = None) -> OpsinModule:
    """The module after so many steps under a silent Trainer."""
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(module, ckpt_path=resume, weights_only=True)
    return module
