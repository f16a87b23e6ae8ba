"""Claims about the arithmetic of counter-based choices."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.tasks.shared.streams import below, by_mass, without_replacement, zipf_masses
from tests.helpers.token_tasks import near


def test_the_second_class_has_the_distribution_of_those_left():
    masses = zipf_masses(4, 1.0)
    first, second = without_replacement(np.random.default_rng(0).random((2, 50_000)), masses)
    shares = masses / masses.sum()
    for c in range(4):
        left = np.where(np.arange(4) == c, 0, shares)
        assert near(np.bincount(second[first == c], minlength=4), left / left.sum())


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 8), exponent=st.sampled_from([0.0, 0.7, 30.0]), data=st.data())
def test_drawing_without_replacement_never_repeats_even_at_the_edges(n, exponent, data):
    edge = st.sampled_from([0.0, 2.0**-53, 0.5, 1 - 2.0**-53]) | st.floats(0, 1, exclude_max=True)
    u = np.array(data.draw(st.lists(edge, min_size=n, max_size=n)))[:, None]
    assert sorted(without_replacement(u, zipf_masses(n, exponent))[:, 0]) == list(range(n))


@given(u=st.floats(0, 1, exclude_max=True), n=st.integers(1, 2**52))
def test_a_uniform_number_never_reaches_its_bound(u, n):
    assert 0 <= below(np.array([min(u, 1 - 2.0**-53)]), n)[0] < n


@settings(max_examples=50, deadline=None)
@given(masses=st.lists(st.integers(1, 2**48), min_size=1, max_size=8))
def test_every_class_is_drawn_from_its_own_share_of_the_numbers(masses):
    masses = np.array(masses)
    ends = masses.cumsum() / masses.sum()
    u = np.random.default_rng(0).random(200)
    clear = (np.abs(u[:, None] - ends) > 1e-12).all(1)
    assert (by_mass(u, masses)[clear] == (u[clear, None] > ends).sum(1)).all()
    assert by_mass(np.array([0.0, 1 - 2.0**-53]), masses).tolist() == [0, len(masses) - 1]
