"""What the tests of the token tasks share: counting, slow searches, and a short run."""

import numpy as np
import torch

from opsin.callbacks import InductionHeads, PhaseChange, PreviousTokenHeads
from opsin.model.transformer import Transformer
from opsin.training.module import OpsinModule
from tests.helpers.toys import train


def near(counts, shares, sigmas=5):
    """Whether counts are those of independent draws with these probabilities."""
    n, shares = counts.sum(), np.asarray(shares)
    return (np.abs(counts - n * shares) <= sigmas * np.sqrt(n * shares * (1 - shares)) + 1e-9).all()


def rows(task, split="train", count=2000, seed=3):
    """``count`` sequences of one member by name, numpy arrays [count, ...]."""
    return {name: tensor[0, 0].numpy() for name, tensor in task.draw([seed], 0, 1, split, count).items()}


def searched_truth(batch, copied, context=1):
    """Query, match and other of the first member's sequences, entry by entry; ``copied`` [B, L]."""
    tokens, targets = batch.tokens[0].tolist(), batch.targets[0].tolist()
    query = np.zeros(np.shape(copied), bool)
    match, other = np.zeros((2, *query.shape, query.shape[1]), bool)
    for b, sequence in enumerate(tokens):
        for row in range(context - 1, len(sequence)):
            ending = sequence[row - context + 1 : row + 1]
            keys = [k for k in range(context, row + 1) if sequence[k - context : k] == ending]
            right = [k for k in keys if sequence[k] == targets[b][row]]
            if copied[b][row] and right:
                query[b, row] = True
                match[b, row, right] = True
                other[b, row, [k for k in keys if k not in right]] = True
    return query, match, other


def agrees(truth, searched):
    """Whether a batch's truth is what was searched for."""
    found = (truth.query[0], truth.match[0], truth.other[0])
    return all(np.array_equal(a.numpy(), b) for a, b in zip(found, searched, strict=True))


def loss(log_probabilities, batch):
    """Negative log-likelihood [M, B, L]."""
    return -log_probabilities.gather(-1, batch.targets[..., None]).squeeze(-1)


def check_streams(task, first, count, seeds):
    """A step is the same alone and in a chunk, a member the same alone and among others."""
    chunk = task.draw(seeds, first, count)
    for s in range(count):
        for m, seed in enumerate(seeds):
            alone = task.draw([seed], first + s, 1)
            assert all(torch.equal(chunk[name][s, m], alone[name][0, 0]) for name in chunk)


def check_other_draws(task):
    """Another seed, step or split gives other data, and no draw touches the global generators."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    base = task.draw([1], 5, 1)["tokens"]
    different = [([2], 5, 1), ([1], 6, 1), ([2**64 - 1], 5, 1)]
    different += [([1], 5, 1, f"eval/{name}") for name in task.evaluations]
    assert all(not torch.equal(base, task.draw(*arguments)["tokens"]) for arguments in different)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def check_second_half_repeats(task, split="eval/repeated"):
    """The evaluation set that isolates copying is what it says, and its truth says where."""
    batch = task.batch(0, 0, split, 50)
    tokens = torch.cat([batch.tokens, batch.targets[..., -1:]], -1)
    half = task.positions // 2
    assert torch.equal(tokens[..., half:], tokens[..., : task.positions + 1 - half])
    rows = torch.arange(half + task.context - 1, task.positions)
    assert batch.truth.query[..., rows].all() and batch.truth.match[..., rows, rows - half + 1].all()


def check_exact_is_finite_and_normal(task):
    """On every split: probabilities that sum to one, and members that share a probe get the same."""
    for split in ("train", *(f"eval/{name}" for name in task.evaluations)):
        for seeds in ([0, 0], [0, 1]):
            draw = {name: tensor[0] for name, tensor in task.draw(seeds, 2, 1, split, 6).items()}
            batch = task.assemble({}, draw)
            found = task.exact(batch)
            assert found.isfinite().all() and torch.allclose(found.exp().sum(-1), torch.ones(()).double())
            alone = task.exact(task.batch(seeds[1], 2, split, 6))
            assert torch.equal(found[1], alone[0])


def run_three_steps(task):
    """A run of three steps with what measures heads and phases."""
    model = OpsinModule(
        task,
        Transformer(layers=2, width=16, heads=2, mlp_ratio=2.0, positions="learned"),
        steps_per_batch=3,
        log_every=1,
        probe_size=40,
        compile=False,
    )
    train(model, 3, InductionHeads(every=1), PreviousTokenHeads(every=1), PhaseChange())
    strength = np.stack(model.history["induction_strength"].values)
    assert np.isfinite(strength).all() and (np.abs(strength) <= 1).all() and (strength != 0).any()
    assert model.summary["plateau"] == list(task.baselines().values())[-1]
    assert np.isfinite(model.summary["final_loss"])
