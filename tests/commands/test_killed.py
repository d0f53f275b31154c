"""kill -9: what a killed run leaves is a whole checkpoint, and the next run goes on from it."""

from __future__ import annotations

from tests.helpers.kills import kill_again_and_again
from tests.helpers.runs import small_runs  # noqa: F401


def test_a_killed_run_leaves_a_whole_checkpoint_that_goes_on(tmp_path):
    """`python -m tests.helpers.kills 50` is the long form."""
    found = kill_again_and_again(tmp_path, 3, seed=71, limit_train=16, longest=0.5)
    assert found.kills == 3 and found.checkpoints == found.resumed >= 1  # the first kill comes after an epoch
