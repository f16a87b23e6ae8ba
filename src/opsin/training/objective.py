"""What is minimised and what is measured: the loss, the accuracy, and the same among plausible outputs."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from opsin.task import Batch

ABSENT_LOGIT = -1e20


def scored_logits(logits: Float[Tensor, "M B L V"], batch: Batch) -> Float[Tensor, "M B Q V"]:
    """Logits at the positions that enter the loss."""
    return logits[:, :, list(batch.layout.scored)]


def cross_entropy(logits: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, "M B Q"]:
    """Negative log-likelihood of the targets, in nats."""
    return -logits.log_softmax(-1).gather(-1, batch.targets[..., None]).squeeze(-1)


def accuracy(logits: Float[Tensor, "M B Q V"], batch: Batch) -> Float[Tensor, " M"]:
    """Share of scored positions whose most likely output is the target."""
    return (logits.argmax(-1) == batch.targets).to(logits.dtype).mean((1, 2))


def restrict(logits: Float[Tensor, "M B Q V"], plausible: Bool[Tensor, "M B V"]) -> Float[Tensor, "M B Q V"]:
    """Logits with outputs that do not occur in the context ruled out."""
    return logits + ABSENT_LOGIT * (~plausible[:, :, None]).to(logits.dtype)


def evaluation_metrics(logits: Float[Tensor, "M B Q V"], batch: Batch) -> dict[str, Float[Tensor, " M"]]:
    """Loss and accuracy, and where the task names plausible outputs the accuracy and probability among them."""
    metrics = {"loss": cross_entropy(logits, batch).mean((1, 2)), "accuracy": accuracy(logits, batch)}
    if batch.plausible is not None:
        possible = restrict(logits, batch.plausible)
        metrics["accuracy_in_context"] = accuracy(possible, batch)
        metrics["probability_in_context"] = (-cross_entropy(possible, batch)).exp().mean((1, 2))
    return metrics
