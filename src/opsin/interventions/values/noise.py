"""Random numbers made inside the graph, by hashing where and when they are used.

They are the same eager and compiled and hold no state: a member's depend on its seed and the step, and
not on its slot or its neighbours.

Legend: M members, B batch.
"""

from __future__ import annotations

import math
import zlib

import torch
from jaxtyping import Float, Int64
from torch import Tensor

UINT32_MAX = 2**32 - 1
_EXAMPLES_SALT = 0x6578616D


def mixed(x: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """A permutation of the numbers below 2**32 in which nothing is left of their order.

    Two rounds of xorshift and multiplication, with constants from Wellons' hash prospector
    (github.com/skeeto/hash-prospector, two-round functions; exact bias 0.165).
    """
    # both factors are below 2**31, so no product of 64 bits overflows, which compilers leave undefined
    x = (x + 0x1E3779B9) & UINT32_MAX  # else 0 would stay 0
    x = ((x ^ (x >> 16)) * 0x604BAA5D) & UINT32_MAX
    x = ((x ^ (x >> 15)) * 0x43D6CE97) & UINT32_MAX
    return x ^ (x >> 15)


def salt_of(name: str) -> int:
    """A number below 2**32 that stands for a name."""
    return zlib.crc32(name.encode())


def keys(clock: Int64[Tensor, "M 2"], salt: int, number: int = 0) -> Int64[Tensor, " M"]:
    """A number below 2**32 for every member at this step.

    Args:
        clock: seed of every member and the number of the step.
        salt: what the number is for, as a number below 2**32; different salts give unrelated numbers.
        number: which of several unrelated numbers of one salt.
    """
    seed, step = clock.unbind(1)
    key = torch.full_like(seed, number)
    for word in (salt, seed, seed >> 32, step):
        key = mixed(key ^ (word & UINT32_MAX))
    return key


def hashed_normals(clock: Int64[Tensor, "M 2"], like: Float[Tensor, "M B ..."], salt: int) -> Float[Tensor, "M B ..."]:
    """Standard normals, one an entry, up to 6.8 in size.

    Hashes of the entry's index in the member's activation, made normal by the method of Box and Muller (1958).

    Args:
        clock: seed of every member and the number of the step.
        like: an activation of the shape and precision that the noise gets.
        salt: what the noise is for, as a number below 2**32; different salts give unrelated noise.
    """
    index = torch.arange(like[0].numel(), device=like.device).view(1, *like.shape[1:])
    # three keys, since with one alone two steps could hold the same numbers in another order
    bits = [index]
    for number in range(3):
        key = keys(clock, salt, number).view(-1, *[1] * (like.dim() - 1))
        bits.append(mixed(bits[-1] ^ key))
    return box_muller(bits[2], bits[3], like.dtype)


def box_muller(radius: Int64[Tensor, "..."], angle: Int64[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """A standard normal from two numbers below 2**32 each."""
    # the half keeps the logarithm finite
    share, turn = ((bits.to(dtype) + 0.5) / 2**32 for bits in (radius, angle))
    return (-2 * share.log()).sqrt() * (2 * math.pi * turn).cos()


def another_example(clock: Int64[Tensor, "M 2"], examples: int) -> Int64[Tensor, "M B"]:
    """For each example of a batch the number of another one.

    All look equally far ahead, around the end of the batch; how far is drawn anew at every step.

    Args:
        clock: seed of every member and the number of the step.
        examples: B; the only example of a batch of one gets itself.
    """
    ahead = 1 + keys(clock, _EXAMPLES_SALT) % max(examples - 1, 1)
    return (torch.arange(examples, device=clock.device) + ahead[:, None]) % examples
