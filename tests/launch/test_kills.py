"""Claims about kills at random moments; ``./scripts/kill`` makes as many as one likes."""

import pytest

from tests.helpers.campaign import Campaign


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("runs", 20), ("populations", 6), ("forks", 5)])
def test_what_was_killed_at_any_moment_comes_to_the_same_end_and_sends_every_row_once(tmp_path, kind, kills):
    result = getattr(Campaign(tmp_path), kind)(kills)
    assert result.kills == kills and not result.faults, str(result)
