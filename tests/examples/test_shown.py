"""What the reproductions share: each refuses the same arguments, and numbers have their errors."""

import numpy as np
import pytest

import group_robust_bandit
import group_robust_opinions
import pref_attributes
import pref_jester
from shown import number

pytestmark = pytest.mark.core


@pytest.mark.parametrize("script", [group_robust_bandit, group_robust_opinions, pref_attributes, pref_jester])
@pytest.mark.parametrize(
    "argv, message",
    [
        ("--seeds 1", "--seeds needs at least 2 for a standard error, got 1"),
        ("--out nowhere/f.png", "--out needs a .png, .svg or .pdf in a folder that exists, got nowhere/f.png"),
        ("--out f.txt", "--out needs a .png, .svg or .pdf in a folder that exists, got f.txt"),
    ],
)
def test_a_bad_argument_is_refused_with_what_was_needed(script, argv, message, capsys):
    with pytest.raises(SystemExit):
        script.main(argv.split())
    assert message in capsys.readouterr().err


def test_a_number_has_its_standard_error():
    # .4 and .5: mean .45, standard deviation .0707, error .05
    assert number(np.array([0.4, 0.5])) == ".450±.050"
    assert number(np.array([-0.4, -0.5])) == "-.450±.050"
    assert number(np.array([10.0, 12.0])) == "11.000±1.000"
    assert number(np.array([20.0, 22.0]), digits=2) == "21.00±1.00"
