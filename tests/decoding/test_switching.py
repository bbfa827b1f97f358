"""Entropy and switches against the sheet's trace, closed forms and the rule spelled out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy

from dyncomp.core.errors import DyncompError
from dyncomp.decoding import (
    EntropySwitch,
    PeriodicSwitch,
    RandomSwitch,
    entropy_bits,
    parameter_share,
    run_lengths,
    shuffled_runs,
    switches,
    tokens_read,
)
from dyncomp.decoding.trace import runs_of

RNG = np.random.default_rng(0)
quick = settings(deadline=None, derandomize=True, max_examples=25)


@pytest.fixture(autouse=True)
def strictly(strict):
    """No implicit promotion anywhere in this file."""


def float32(values):
    return jnp.asarray(values, jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def scanned(switch, entropies, threshold, key):
    """Model that made each token, [b t]: entropy t is known after token t."""

    def step(state, entropy):
        after, _ = switch.step(state, entropy, threshold)
        return after, state.model

    state = switch.init(entropies.shape[0], key)
    return jax.lax.scan(step, state, entropies.T)[1].T


def trace(switch, entropies, threshold=0.0, seed=0):
    return np.asarray(scanned(switch, float32(entropies), float32(threshold), jax.random.key(seed)))


# entropy


def test_entropy_in_float64():
    logits = RNG.normal(size=(5, 64)).astype(np.float32) * 5
    p = np.exp(logits.astype(np.float64))
    wanted = scipy_entropy(p, base=2, axis=-1)
    ours = entropy_bits(jnp.asarray(logits))
    np.testing.assert_allclose(ours, wanted, atol=1e-5)
    np.testing.assert_allclose(entropy_bits(float32(logits) + 30.0), wanted, atol=1e-4)
    assert entropy_bits(jnp.asarray(logits, jnp.bfloat16)).dtype == jnp.float32


def test_entropy_at_the_ends():
    v = 49
    ends = jnp.stack(
        [jnp.zeros(v), jnp.full(v, -jnp.inf).at[3].set(2.0), jnp.zeros(v).at[0].set(500.0)]
    )
    np.testing.assert_allclose(entropy_bits(ends), [np.log2(v), 0, 0], atol=1e-6)
    half = jnp.full((1, v), -jnp.inf).at[0, :8].set(1.0)
    np.testing.assert_allclose(entropy_bits(half), [3.0], rtol=1e-6)
    assert entropy_bits(jnp.zeros(v)).shape == ()


# the rule


def by_hand(entropies, tau, window, min_dwell, start):
    """The rule of the sheet for one row, step by step."""
    model, since, made = {"small": 0, "large": 1}[start], 0, []
    for t in range(len(entropies)):
        made.append(model)
        since += 1
        mean = np.mean(np.float32(entropies[max(0, t + 1 - window) : t + 1]))
        wanted = int(mean > tau)
        if since >= min_dwell and wanted != model:
            model, since = wanted, 0
    return made


def test_the_trace_of_the_sheet():
    entropies = [0.1] * 12 + [3.0] * 6 + [0.1] * 20
    made = trace(EntropySwitch(start="small"), [entropies], 1.0)[0].tolist()
    assert made == [0] * 14 + [1] * 10 + [0] * 14


@quick
@given(
    st.integers(0, 1000),
    st.sampled_from([(1, 1), (5, 1), (5, 10), (16, 10)]),
    st.sampled_from(["small", "large"]),
)
def test_the_rule_row_by_row(seed, knobs, start):
    window, min_dwell = knobs
    rng = np.random.default_rng(seed)
    # Quarters, so that means of a window are exact or far from the threshold.
    entropies = rng.integers(0, 16, (3, 60)) / 4
    tau = np.float32([0.93, 1.87, 2.61])
    made = trace(EntropySwitch(window=window, min_dwell=min_dwell, start=start), entropies, tau)
    for row in range(3):
        assert made[row].tolist() == by_hand(entropies[row], tau[row], window, min_dwell, start)
    assert (switches(made) <= 60 // min_dwell).all()
    for row in made:
        assert all(length >= min_dwell for _, length in runs_of(row)[:-1])


def test_equality_goes_to_the_small_model():
    made = trace(EntropySwitch(window=1, min_dwell=1), [[2.0, 2.0, 2.5, 2.0]], 2.0)
    assert made.tolist() == [[1, 0, 0, 1]]


def test_thresholds_at_the_ends():
    entropies = RNG.uniform(0, 5, (2, 40))
    switch = EntropySwitch(start="small", min_dwell=10)
    assert trace(switch, entropies, -np.inf).tolist() == [[0] * 10 + [1] * 30] * 2
    assert (trace(switch, entropies, 5.0) == 0).all()
    assert (trace(EntropySwitch(), entropies, -1.0) == 1).all()
    assert trace(EntropySwitch(), entropies, 5.0).tolist() == [[1] * 10 + [0] * 30] * 2


def test_without_memory_each_entropy_decides():
    entropies = RNG.uniform(0, 4, (3, 50))
    made = trace(EntropySwitch(window=1, min_dwell=1), entropies, 2.0)
    np.testing.assert_array_equal(made[:, 1:], np.float32(entropies)[:, :-1] > 2.0)


def test_a_threshold_is_no_new_program(counting_jit):
    switch = EntropySwitch()
    step, traces = counting_jit(switch.step)
    state = switch.init(2)
    for tau in (0.5, 1.5):
        state, model = step(state, float32([1.0, 2.0]), float32(tau))
    assert len(traces) == 1 and model.dtype == jnp.int32


# controls


def test_periodic():
    made = trace(PeriodicSwitch(large=2, small=3, start="small"), np.zeros((2, 12)))
    assert made.tolist() == [[0, 0, 0, 1, 1] * 2 + [0, 0]] * 2


def test_random_runs_come_from_the_given_lengths():
    switch = RandomSwitch(large=(2, 5), small=(3, 9, 9))
    made = trace(switch, np.zeros((8, 4000)), seed=4)
    small, large = run_lengths(made)
    assert set(large) == {2, 5} and set(small) == {3, 9}
    # Means 3.5 and 7: the large model's share in the long run.
    assert np.mean(made == 1) == pytest.approx(3.5 / 10.5, abs=0.01)
    assert np.mean(np.asarray(small) == 9) == pytest.approx(2 / 3, abs=0.03)
    assert (made[0] != made[1]).any()
    np.testing.assert_array_equal(made, trace(switch, np.ones((8, 4000)), seed=4))
    assert (made != trace(switch, np.zeros((8, 4000)), seed=5)).any()


def test_random_runs_imitate_an_entropy_switch():
    entropies = np.cumsum(RNG.normal(size=(8, 600)), axis=1) % 4
    made = trace(EntropySwitch(min_dwell=4), entropies, 2.0)
    small, large = run_lengths(made)
    control = trace(RandomSwitch(large=large, small=small), np.zeros((8, 4000)))
    whole = np.mean(large) / (np.mean(large) + np.mean(small))
    assert np.mean(control == 1) == pytest.approx(whole, abs=0.03)


@quick
@given(st.integers(0, 1000))
def test_shuffled_runs_keep_runs_and_share(seed):
    rng = np.random.default_rng(seed)
    made = np.repeat(rng.integers(0, 2, (2, 20)), rng.integers(1, 4, 20), axis=1)
    shuffled = shuffled_runs(rng, made)
    assert shuffled.shape == made.shape and shuffled.dtype == made.dtype
    for old, new in zip(made, shuffled, strict=True):
        assert sorted(runs_of(old)) == sorted(runs_of(new))
        assert [m for m, _ in runs_of(old)] == [m for m, _ in runs_of(new)]


def test_runs_that_the_end_cuts_are_left_out_where_others_exist():
    made = np.asarray([[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]])
    assert run_lengths(made) == ((2,), (3, 1))
    assert run_lengths(made[1:]) == ((5,), (1,))


# cost


def test_share_of_parameters():
    large_only, small_only = np.ones((2, 5), int), np.zeros((2, 5), int)
    assert parameter_share(large_only, 3, 11) == 1
    assert parameter_share(small_only, 3, 11) == pytest.approx(3 / 11)
    # The paper's two pairs: 43 % of tokens saves 41.5 %, 25 % saves 67 % (re-derived sizes).
    made = np.repeat([1, 0], [43, 57])
    assert 1 - parameter_share(made, 2.99, 11) == pytest.approx(0.415, abs=5e-4)
    made = np.repeat([1, 0], [25, 75])
    assert 1 - parameter_share(made, 1.49, 14) == pytest.approx(0.67, abs=1e-3)
    with pytest.raises(DyncompError, match="parameter_share"):
        parameter_share(made, 0, 11)


def test_catching_up_reads_every_token_once():
    made = np.asarray([[1, 1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]])
    read = tokens_read(made)
    assert read.tolist() == [[1, 1, 3, 1, 1, 4, 2], [1] * 7]
    for row, tokens in zip(made, read, strict=True):
        for model in set(row.tolist()):
            assert tokens[row == model].sum() == np.flatnonzero(row == model)[-1] + 1
    assert switches(made).tolist() == [3, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EntropySwitch(window=0), "window=0"),
        (lambda: EntropySwitch(min_dwell=0), "min_dwell=0"),
        (lambda: PeriodicSwitch(large=0, small=1), "large=0"),
        (lambda: RandomSwitch(large=(), small=(1,)), "large="),
        (lambda: RandomSwitch(large=(1,), small=(0,)), "small="),
        (lambda: RandomSwitch(large=(1,), small=(1,)).init(2), "random key"),
    ],
)
def test_bad_switches_are_refused(make, message):
    with pytest.raises(DyncompError, match=message):
        make()


def test_unknown_start_is_refused(unchecked):
    with pytest.raises(DyncompError, match="start='medium'"):
        EntropySwitch(start="medium")
