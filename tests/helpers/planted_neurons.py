"""Models whose last MLP has neurons that are known: what the tests of neurons' metrics share."""

from __future__ import annotations

import torch

from opsin.metrics.mean_ablation import mean_ablation_effects, unit_log_unigram
from opsin.metrics.neuron_weights import ReadOut
from opsin.model.transformer import Transformer
from tests.helpers.toys import ToyTokens, batch_of, run, weights

TASK = ToyTokens()
MODEL = Transformer(layers=1, width=12, heads=2, mlp_ratio=1.0)
# of so many neurons one in a hundred is more than the few that are planted
WIDE = Transformer(layers=1, width=12, heads=2, mlp_ratio=40.0)
LAST = "blocks.0."
V, D, N = TASK.n_outputs, MODEL.width, 12
UNIGRAM = 1 / torch.arange(1, V + 1, dtype=torch.float64)
UNIGRAM /= UNIGRAM.sum()
ENTROPY, FREQUENCY, ORDINARY = 2, 5, 7


class MeasuredModel:
    """A model on one batch, and what the metrics of neurons need of it."""

    def __init__(self, values, batch=None, model=MODEL):
        self.values, self.model = values, model
        self.batch = batch_of(TASK, dtype=torch.float64) if batch is None else batch
        self.logits, self.seen = run(model, values, self.batch)
        self.resid, self.post = self.seen[LAST + "hook_resid_post"], self.seen[LAST + "mlp.hook_post"]
        self.w_out, self.read_out = values[LAST + "mlp.W_out"], ReadOut.of(values)
        # every position has a next token, but for the last, which is given any
        self.targets = self.batch.tokens.roll(-1, -1)

    def effects(self, w_out=None, **options):
        """Effects of ablating the neurons, or neurons of other output weights."""
        given = {"targets": self.targets, "unigram": UNIGRAM, **options}
        return mean_ablation_effects(
            self.read_out, self.resid, self.post, self.w_out if w_out is None else w_out, **given
        )

    def outcomes(self, logits):
        """Entropy, loss and KL from the unigram of every token, by textbook formulas."""
        p, log_p = logits.softmax(-1), logits.log_softmax(-1)
        return {
            "entropy": torch.distributions.Categorical(logits=logits).entropy(),
            "loss": -log_p.gather(-1, self.targets[..., None])[..., 0],
            "kl": (p * (log_p - UNIGRAM.log())).sum(-1),
        }

    def rerun(self, tap):
        """Logits of the model run again under a tap."""
        return run(self.model, self.values, self.batch, tap)[0]

    def change(self, logits):
        """Outcomes of other logits minus those of the model."""
        before, after = self.outcomes(self.logits), self.outcomes(logits)
        return {name: after[name] - before[name] for name in before}


def any_model(seeds=(0, 1), **shape):
    """Two members with weights that nothing is planted in."""
    model = Transformer(**{**vars(MODEL), **shape})
    return MeasuredModel(weights(model, TASK, seeds), batch_of(TASK, seeds, dtype=torch.float64), model)


def frozen(tap, scale):
    """The tap, and the last LayerNorm divides by what it would divide by without it."""
    return lambda name, x: scale if name == "ln_final.hook_scale" else tap(name, x)


def planted():
    """One member: an entropy, a token-frequency and an ordinary neuron of one activation and norm, among weak ones.

    The first writes where the read-out cannot see and where the residual stream already is; the second moves the logits
    along the log-unigram, the third against each other and not along it; none of these has a part elsewhere.
    """
    values = weights(WIDE, TASK, (3,))
    values["unembed.W_U"] = 6 * values["unembed.W_U"]
    matrix = ReadOut.of(values).effective()[0]
    ones = torch.ones(D, dtype=torch.float64) / D**0.5
    unseen = torch.linalg.svd(torch.cat([matrix, ones[:, None]], 1), full_matrices=True)[0][:, V:]
    direction = unit_log_unigram(UNIGRAM)
    other = torch.eye(V, dtype=torch.float64)[3] - torch.eye(V, dtype=torch.float64)[4]
    other = other - (other @ direction) * direction
    w_out = 0.05 * values[LAST + "mlp.W_out"][0]
    w_out[ENTROPY] = 3 * unseen[:, 0]
    w_in = values[LAST + "mlp.W_in"][0]
    for neuron, logits in ((FREQUENCY, direction), (ORDINARY, other)):
        weight = logits @ torch.linalg.pinv(matrix)
        w_out[neuron] = 3 * weight / weight.norm()
        w_in[:, neuron] = w_in[:, ENTROPY]
    values[LAST + "mlp.W_out"] = w_out[None]
    values[LAST + "mlp.b_out"] = 6 * unseen[None, :, 0]
    return MeasuredModel(values, batch_of(TASK, (3,), dtype=torch.float64), WIDE)
