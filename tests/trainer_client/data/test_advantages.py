from __future__ import annotations

import numpy as np
import pytest

from trainer_client.data.advantages import group_advantages, truncated_importance_weights


def test_advantages_are_normalised_within_their_group_only() -> None:
    # groups need not be sorted, of one size, or numbered from 0
    given = group_advantages([1.0, 10.0, 3.0, 30.0, 5.0], [4, 9, 4, 9, 4])
    assert given.dtype == np.float32
    # group 4: mean 3, std 2 (n − 1); group 9: mean 20, std √200
    expected = [-2 / 2.0001, -10 / (200**0.5 + 1e-4), 0, 10 / (200**0.5 + 1e-4), 2 / 2.0001]
    np.testing.assert_allclose(given, expected, rtol=1e-6)


def test_without_std_they_are_only_centred() -> None:
    np.testing.assert_array_equal(group_advantages([1, 3, 7], [0, 0, 1], scale_by_std=False), [-1, 1, 0])


def test_equal_rewards_and_groups_of_one_carry_no_signal() -> None:
    np.testing.assert_array_equal(group_advantages([0.1, 0.1, 0.1, 5.0], [0, 0, 0, 1]), [0, 0, 0, 0])


def test_a_reward_that_is_no_number_is_named() -> None:
    with pytest.raises(ValueError, match="row 1 is nan"):
        group_advantages([1.0, np.nan, 0.0], [0, 0, 0])
    with pytest.raises(ValueError, match="one length"):
        group_advantages([1.0, 2.0], [0, 0, 0])
    assert group_advantages([], []).shape == (0,)


def test_importance_weights_are_ratios_up_to_the_cap() -> None:
    weights = truncated_importance_weights(np.log([0.5, 0.2, 0.9]), np.log([0.5, 0.4, 0.1]), cap=3.0)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [1.0, 0.5, 3.0], rtol=1e-6)


def test_an_absurd_difference_is_capped_without_overflow() -> None:
    with np.errstate(all="raise"):
        np.testing.assert_allclose(truncated_importance_weights([0.0], [-1e6]), [2.0])


def test_masked_tokens_weigh_nothing_and_may_lack_values() -> None:
    weights = truncated_importance_weights([[0.0, np.nan]], [[0.0, np.nan]], [[1, 0]])
    np.testing.assert_array_equal(weights, [[1.0, 0.0]])


def test_a_missing_value_that_counts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at \(0, 1\)"):
        truncated_importance_weights([[0.0, 0.0]], [[0.0, np.nan]])
    with pytest.raises(ValueError, match="one shape"):
        truncated_importance_weights([0.0, 0.0], [0.0])
    with pytest.raises(ValueError, match="cap"):
        truncated_importance_weights([0.0], [0.0], cap=0.0)
