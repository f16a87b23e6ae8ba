"""Predictors that several tasks know: chance, n-grams, least squares, ridge, a gradient step, neighbours, mixtures.

Pure functions. A prediction is what a model would have to put out to predict the same: for classes log-probabilities
(nats), for numbers the numbers. Those that learn from the context take it as examples x [..., n, d] with answers
y [..., n, V], and ask for the answer at one further x [..., d]; leading axes are members, sequences, queries.

Legend: M members, B batch, L positions, Q scored positions, T tokens, V outputs, n examples before a query, d entries
of x, k neighbours, C weight vectors of a mixture.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opsin.task import Batch, Reference

LEAST_PROBABILITY = 1e-12
"""Smallest probability of a class that a reference hands out, so that every loss of it is finite."""

LEAST_SINGULAR = 1e-9
"""Singular values below this share of the largest count as zero in least squares."""

Learner = Callable[[Float[Tensor, "*s n d"], Float[Tensor, "*s n V"], Float[Tensor, "*s d"]], Float[Tensor, "*s V"]]
"""From examples, their answers and one further x to the answer there."""


# ---- classes ----------------------------------------------------------------------------------------


def as_logits(probabilities: Float[Tensor, "*s V"]) -> Float[Tensor, "*s V"]:
    """Log-probabilities (nats), finite where a probability is 0."""
    return probabilities.clamp(min=LEAST_PROBABILITY).log()


def always(probabilities: Float[Tensor, " V"]) -> Reference:
    """The reference that hands out one distribution whatever it is shown: chance, or a unigram.

    Args:
        probabilities: probability of every class, which sum to 1.
    """

    def predict(batch: Batch) -> Float[Tensor, "M B Q V"]:
        members, size = batch.tokens.shape[:2]
        known = as_logits(probabilities).to(batch.tokens.device)
        return known.expand(members, size, len(batch.layout.scored), -1)

    return predict


def chance(outputs: int) -> Reference:
    """Equal probabilities.

    Args:
        outputs: V, number of classes.
    """
    return always(torch.full((outputs,), 1 / outputs))


def among_plausible(uninformed: float) -> Reference:
    """Equal probabilities of the outputs that occur in the context, as far as one of them is the answer.

    Args:
        uninformed: share of sequences whose answer is any output, equally likely, whatever the context holds.
    """

    def predict(batch: Batch) -> Float[Tensor, "M B Q V"]:
        assert batch.plausible is not None
        among = batch.plausible.double()
        outputs = among.shape[-1]
        p = (1 - uninformed) * among / among.sum(-1, keepdim=True) + uninformed / outputs
        return as_logits(p)[:, :, None].expand(-1, -1, len(batch.layout.scored), -1)

    return predict


def after_token(probabilities: Float[Tensor, "T V"]) -> Reference:
    """Bigrams: the distribution of the next token given the one at each scored position.

    Args:
        probabilities: probability [t, x] of output x after token t; every row sums to 1.
    """

    def predict(batch: Batch) -> Float[Tensor, "M B Q V"]:
        rows = [batch.layout.tokens.index(position) for position in batch.layout.scored]
        return as_logits(probabilities).to(batch.tokens.device)[batch.tokens[:, :, rows]]

    return predict


def on_sequences(predict: Callable[[Int[Tensor, "n L"]], Float[Tensor, "n L V"]], batch: Batch) -> Tensor:
    """Log-probabilities (nats) ``[M, B, L, V]`` of a predictor of token sequences that works on the CPU.

    Args:
        predict: function from sequences to probabilities of the token after each position.
        batch: tokens at all positions; where all members see the same sequences one of them is asked about.
    """
    tokens = batch.tokens.cpu()
    different = tokens[:1] if bool((tokens == tokens[:1]).all()) else tokens
    found = predict(different.flatten(0, 1))
    found = found.clamp(min=torch.finfo(found.dtype).tiny).log().view(*different.shape, -1)
    return found.expand(len(tokens), -1, -1, -1).to(batch.tokens.device)


def nearest_label(batch: Batch, outputs: int, certainty: float = 1 - 1e-6) -> Float[Tensor, "M B Q V"]:
    """The label of the most similar input of the context (``Batch.similarity``), as log-probabilities.

    Of several equally similar inputs the labels share the probability.

    Args:
        batch: few-shot sequences, in which labels follow their inputs.
        outputs: V, number of classes.
        certainty: probability of these labels together; the rest is shared by all classes.
    """
    layout = batch.layout
    similarity = batch.similarity()[:, :, list(layout.scored)][..., list(layout.labels)]
    nearest = (similarity == similarity.amax(-1, keepdim=True)).double()
    share = nearest / nearest.sum(-1, keepdim=True)
    labels = batch.tokens[:, :, [layout.tokens.index(position) for position in layout.labels]]
    shown = torch.nn.functional.one_hot(labels, outputs).double()
    return as_logits(certainty * share @ shown + (1 - certainty) / outputs)


# ---- numbers, learned from the context --------------------------------------------------------------


def least_squares(
    x: Float[Tensor, "*s n d"], y: Float[Tensor, "*s n V"], at: Float[Tensor, "*s d"]
) -> Float[Tensor, "*s V"]:
    """Ordinary least squares without intercept; of several solutions the one of smallest norm.

    Args:
        x: inputs of the examples.
        y: answers of the examples.
        at: input whose answer is wanted.
    """
    weights = torch.linalg.pinv(x.double(), rtol=LEAST_SINGULAR) @ y.double()
    return (at.double()[..., None, :] @ weights).squeeze(-2).to(y.dtype)


def ridge(penalty: float) -> Learner:
    """Least squares with a penalty on squared weights; at s^2/t^2 Bayes' rule for weights N(0, t^2), noise N(0, s^2).

    Args:
        penalty: factor of the squared 2-norm of the weights beside the sum of squared errors, more than 0.
    """

    def predict(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
        a, identity = x.double(), torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)
        weights = torch.linalg.solve(a.mT @ a + penalty * identity, a.mT @ y.double())
        return (at.double()[..., None, :] @ weights).squeeze(-2).to(y.dtype)

    return predict


def gradient_step(rate: Callable[[int], float]) -> Learner:
    """Weights after one step of gradient descent from zero on half the sum of squared errors: rate times x'y.

    For x, w ~ N(0, 1) in d entries and noise of variance s^2 the rate 1 / (n + d + 1 + s^2) minimises the expected
    error of such a step.

    Args:
        rate: function from the number of examples to the step's size.
    """

    def predict(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
        weights = rate(x.shape[-2]) * (x.mT @ y)
        return (at[..., None, :] @ weights).squeeze(-2)

    return predict


def nearest_neighbours(k: int) -> Learner:
    """Mean answer of the k examples nearest to the input by Euclidean distance; of all where there are fewer.

    Args:
        k: number of neighbours, at least 1.
    """

    def predict(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
        distance = (x - at[..., None, :]).square().sum(-1)
        chosen = distance.topk(min(k, x.shape[-2]), dim=-1, largest=False).indices
        return y.gather(-2, chosen[..., None].expand(*chosen.shape, y.shape[-1])).mean(-2)

    return predict


def _losses_of(
    components: Float[Tensor, "C d"], x: Float[Tensor, "*s n d"], y: Float[Tensor, "*s n 1"]
) -> Float[Tensor, "*s C"]:
    """Sum of squared errors that each weight vector has on the examples."""
    return (x.double() @ components.to(x.device).double().mT - y.double()).square().sum(-2)


def _answer_by_shares(
    components: Float[Tensor, "C d"], share: Float[Tensor, "*s C"], at: Float[Tensor, "*s d"]
) -> Float[Tensor, "*s 1"]:
    """The answer of the components, each by its share."""
    weights = share @ components.to(at.device).double()
    return (weights * at.double()).sum(-1, keepdim=True)


def posterior_mean(components: Float[Tensor, "C d"], variance: float) -> Learner:
    """Bayes' rule where the weights are one of some vectors, equally likely, and y has Gaussian noise.

    The mean of w_j.x by the posterior softmax(-SSE_j / (2 variance)), SSE_j the sum of squared errors of w_j on the
    examples (Pathak et al. 2023, section 3); without examples the mean of all.

    Args:
        components: weight vectors that there are.
        variance: variance of the noise, more than 0.
    """

    def predict(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
        share = (-_losses_of(components, x, y) / (2 * variance)).softmax(-1)
        return _answer_by_shares(components, share, at).to(y.dtype)

    return predict


def likeliest_component(components: Float[Tensor, "C d"]) -> Learner:
    """The answer of the weight vector, of some, with the least sum of squared errors on the examples.

    Args:
        components: weight vectors that there are.
    """

    def predict(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
        best = _losses_of(components, x, y).argmin(-1)
        share = torch.nn.functional.one_hot(best, len(components)).double()
        return _answer_by_shares(components, share, at).to(y.dtype)

    return predict


def in_context(
    x: Float[Tensor, "M B n d"], y: Float[Tensor, "M B n V"], learner: Learner, fewest: int = 1
) -> Float[Tensor, "M B n V"]:
    """What a learner predicts for every pair of a sequence from the pairs before it; 0 for the first.

    Args:
        x: inputs of the pairs, in their order.
        y: answers of the pairs.
        learner: from examples and one further input to the answer there.
        fewest: examples that the learner needs to say anything; with fewer the answer is 0.
    """
    rows = [torch.zeros_like(y[:, :, 0]) for _ in range(fewest)]
    rows += [learner(x[:, :, :count], y[:, :, :count], x[:, :, count]) for count in range(fewest, x.shape[2])]
    return torch.stack(rows, 2)
