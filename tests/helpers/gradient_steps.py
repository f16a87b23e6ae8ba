"""A transformer built by hand whose answers are those of one step of gradient descent.

After von Oswald et al. 2023, "Transformers learn in-context by gradient descent": linear attention from a query's x to
every example's x, of which y is read. A layer before it brings x into the position that holds y.
"""

import torch

from opsin.model.transformer import Transformer


def descending(task, rate):
    """The model, and parameters (M = 1) with which it answers ``rate`` X'y x after any number of examples.

    Channels of the residual stream: y, x, the x of the position before, the answer, the position as a one-hot vector.
    """
    d, length = task.dimensions, task.layout.positions
    width = 2 + 2 * d + length
    answer, position = 1 + 2 * d, 2 + 2 * d
    model = Transformer(
        layers=2, width=width, heads=1, norm=False, positions="learned", max_positions=length, attention="linear",
        scale_scores=False, feature_bias=False, unembed_bias=False,
    )  # fmt: skip
    zero = {parameter.name: torch.zeros(1, *parameter.shape) for parameter in model.parameters(task)}
    read_in, positions, read_out = zero["embed.W_F"][0], zero["pos_embed.W_pos"][0], zero["unembed.W_U"][0]
    read_in[:, : d + 1] = torch.eye(d + 1)
    positions[:, position:] = torch.eye(length)
    read_out[answer] = 1.0
    (q0, k0, v0), (q1, k1, v1) = (zero[f"blocks.{n}.attn.W_QKV"][0].split(width, 1) for n in range(2))
    first = torch.arange(length - 1)
    q0[position + first + 1, first] = 1.0  # each position asks for the one before
    k0[position + first, first] = 1.0
    entries = torch.arange(d)
    v0[1 + entries, entries] = 1.0
    zero["blocks.0.attn.W_O"][0, entries, 1 + d + entries] = 1.0
    q1[1 + entries, entries] = 1.0
    k1[1 + d + entries, entries] = 1.0
    v1[0, 0] = 1.0
    zero["blocks.1.attn.W_O"][0, 0, answer] = rate
    return model, zero
