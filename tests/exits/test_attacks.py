"""Attacks against closed forms, float64 and fresh passes through the network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.exits import ConfidenceRule
from dyncomp.exits import attacks as box
from dyncomp.exits import attacks_l2 as near
from dyncomp.exits.budgets import leaves_at

B, X, C, SIDE = 6, 3, 4, 3
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.1, 0.9, (B, SIDE, SIDE, 1)).astype(np.float32)
FIRST = RNG.normal(size=(SIDE * SIDE, 12)).astype(np.float32)
HEADS = 2.0 * RNG.normal(size=(X, 12, C)).astype(np.float32)
BARS = np.float32([0.7, 0.7])


def net(images):
    """Three exits on one hidden layer."""
    return jnp.einsum("bi,xic->xbc", jnp.tanh(images.reshape(len(images), -1) @ FIRST), HEADS)


def net64(images):
    hidden = np.tanh(images.reshape(len(images), -1).astype(np.float64) @ FIRST)
    return np.einsum("bi,xic->xbc", hidden, HEADS.astype(np.float64))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


LEAVE = box.leaving(ConfidenceRule(), BARS)
DYNAMIC = box.Victim(net, LEAVE, "taken")
CLEAN = net64(IMAGES)
EXITS = leaves_at(softmax(CLEAN[:2]).max(-1).T, BARS)
SAID = CLEAN[EXITS, np.arange(B)].argmax(-1).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("aim", "never"))
def attacked(images, labels, eps, aim="taken", never=False):
    leave = box.leaving(ConfidenceRule(), BARS + 2.0) if never else LEAVE
    return box.pgd(box.Victim(net, leave, aim), images, labels, eps=eps, step=eps / 4, steps=8)


def test_nothing_changes_without_room():
    found = attacked(IMAGES, SAID, 0.0)
    np.testing.assert_array_equal(found.images, IMAGES)
    np.testing.assert_array_equal(LEAVE(net(found.images)), EXITS)
    assert not found.hit.any() and (np.asarray(found.when) == 9).all()


def test_iterates_stay_in_the_box_and_the_first_hit_is_one():
    edge = np.where(IMAGES > 0.5, 1.0, IMAGES).astype(np.float32)  # pixels that may not rise
    labels = np.asarray(DYNAMIC.answer(net(edge)))
    hits = 0
    for eps in (0.05, 0.4):
        found = attacked(edge, labels, eps)
        for images in (found.images, found.first):
            assert np.abs(np.asarray(images) - edge).max() <= eps + 1e-6
            assert np.asarray(images).min() >= 0 and np.asarray(images).max() <= 1
        fresh = net64(np.asarray(found.first))
        exits = leaves_at(softmax(fresh[:2]).max(-1).T, BARS)
        wrong = fresh[exits, np.arange(B)].argmax(-1) != labels
        np.testing.assert_array_equal(found.hit, wrong)
        assert np.asarray(found.when)[wrong].max(initial=0) <= 8
        hits += wrong.sum()
    assert hits > 3


def test_a_threshold_that_is_never_reached_is_the_static_network():
    static = jax.jit(
        lambda x, y: box.pgd(box.Victim(lambda p: net(p)[-1:]), x, y, eps=0.2, step=0.05, steps=8)
    )
    labels = CLEAN[-1].argmax(-1).astype(np.int32)
    one, other = static(IMAGES, labels), attacked(IMAGES, labels, 0.2, aim="last", never=True)
    np.testing.assert_array_equal(one.hit, other.hit)
    np.testing.assert_array_equal(one.images, other.images)
    # float32 softmax saturates at 1, so a threshold of 1 would let this one leave.
    sure = jnp.float32([[[99.0, 0.0]], [[0.0, 1.0]]])
    assert box.leaving(ConfidenceRule(), np.float32([1.0]))(sure)[0] == 0
    assert box.leaving(ConfidenceRule(), np.float32([1.1]))(sure)[0] == 1


def test_one_step_on_a_line_goes_to_the_corner():
    w = np.float32([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 0.8, -1.0]])
    line = box.Victim(lambda x: (x.reshape(len(x), -1) @ w.T)[None])
    images = np.full((2, 2, 2, 1), 0.5, np.float32)
    labels = np.int32([0, 1])
    found = box.fgsm(line, images, labels, eps=0.1)
    # The loss rises along (other - label).
    rises = np.sign(w[1] - w[0]).reshape(2, 2, 1)
    np.testing.assert_allclose(found.images[0], 0.5 + 0.1 * rises, atol=1e-6)
    np.testing.assert_allclose(found.images[1], 0.5 - 0.1 * rises, atol=1e-6)


def test_aims_are_rows_and_means():
    per_exit = jnp.asarray(RNG.normal(size=(X, B)), jnp.float32)
    logits = jnp.asarray(CLEAN, jnp.float32)
    aimed = lambda aim: np.asarray(box.Victim(net, LEAVE, aim).aimed(per_exit, logits))
    np.testing.assert_array_equal(aimed("last"), per_exit[-1])
    np.testing.assert_allclose(aimed("mean"), np.asarray(per_exit).mean(0), rtol=1e-6)
    np.testing.assert_array_equal(aimed("taken"), np.asarray(per_exit)[EXITS, np.arange(B)])
    assert len(set(EXITS)) > 1
    np.testing.assert_array_equal(DYNAMIC.answer(logits), SAID)


def test_slowdown_sends_images_deeper():
    kl = np.asarray(box.uniform_kl(jnp.asarray(CLEAN, jnp.float32)))
    p = softmax(CLEAN)
    np.testing.assert_allclose(kl, (np.log(1 / C / p) / C).sum(-1), rtol=1e-4)
    assert (kl >= 0).all() and float(box.uniform_kl(jnp.full((C,), 3.0))) == pytest.approx(0)
    slow = jax.jit(lambda x: box.slow_down(DYNAMIC, x, eps=0.3, step=0.05, steps=10))
    found = slow(IMAGES)
    after = net64(np.asarray(found.images))
    exits = leaves_at(softmax(after[:2]).max(-1).T, BARS)
    assert exits.mean() > EXITS.mean() + 0.5 and exits.max() <= X - 1
    ours = softmax(after[:2])
    assert np.log(1 / C / ours).sum() < np.log(1 / C / p[:2]).sum()


def test_efficacy_is_the_area_under_what_has_left():
    costs = np.asarray([0.2, 0.5, 1.0])
    grid = np.linspace(0, 1, 20_001)
    gone = (costs[EXITS][None] <= grid[:, None]).mean(1)
    assert box.efficacy(EXITS, costs) == pytest.approx(np.trapezoid(gone, grid), abs=1e-3)
    assert box.efficacy(np.full(3, 2), costs) == 0.0


def test_noise_is_as_large_as_it_says():
    key = jax.random.key(0)
    signs = np.asarray(box.sign_noise(key, IMAGES, 0.05)) - IMAGES
    np.testing.assert_allclose(np.abs(signs), 0.05, atol=1e-6)
    assert 0.2 < (signs > 0).mean() < 0.8
    wanted = np.linspace(0.01, 0.1, B).astype(np.float32)
    moved = np.asarray(box.gaussian_noise(key, IMAGES, wanted)) - IMAGES
    np.testing.assert_allclose(np.sqrt((moved**2).sum((1, 2, 3))), wanted, rtol=1e-3)


def test_nearest_example_on_a_line():
    """The nearest point of a half-space is the lead over the length of the normal away."""
    w = np.float32(RNG.normal(size=(9, 2)))
    w[:, 1] -= 0.5
    images = (0.35 + 0.3 * IMAGES).astype(np.float32)
    z = images.reshape(B, -1) @ w
    bias = np.float32([0.0, np.median(z[:, 0] - z[:, 1])])
    line = box.Victim(lambda x: (x.reshape(len(x), -1) @ w + bias)[None])
    z = z + bias
    labels = z.argmax(-1).astype(np.int32)
    run = jax.jit(lambda x, y: near.cw_l2(line, x, y, steps=150, rounds=6, rate=0.01))
    found = run(images, labels)
    wanted = np.abs(z[:, 0] - z[:, 1]) / np.linalg.norm(w[:, 0] - w[:, 1])
    assert found.hit.all()
    assert (found.distance >= wanted - 1e-4).all()
    np.testing.assert_allclose(found.distance, wanted, rtol=0.1, atol=0.01)
    moved = np.asarray(found.images) - images
    np.testing.assert_allclose(np.sqrt((moved**2).sum((1, 2, 3))), found.distance, rtol=1e-4)


def test_early_terms_by_brute_force():
    said = CLEAN[-1].argmax(-1).astype(np.int32)
    p = softmax(CLEAN)
    early = [p[0, b, said[b]] + p[1, b, said[b]] for b in range(B)]
    above = [
        sum(max(0.0, p[2, b, said[b]] - p[2, b, j]) for j in range(C) if j != said[b])
        for b in range(B)
    ]
    ours = near.early_terms(jnp.asarray(CLEAN, jnp.float32), jnp.asarray(said))
    np.testing.assert_allclose(ours[0], early, rtol=1e-4)
    np.testing.assert_allclose(ours[1], above, rtol=1e-4, atol=1e-6)
    last = jnp.log(jnp.float32([[0.2, 0.2, 0.6], [0.3, 0.2, 0.5], [0.2, 0.4, 0.4]]))
    logits = jnp.stack([jnp.zeros((3, 3)), last])
    zero, some, tied = np.asarray(near.early_terms(logits, jnp.int32([0, 0, 0]))[1])
    assert zero == tied == 0 and some == pytest.approx(
        0.1, abs=1e-6
    )  # above one, yet not the largest


early = jax.jit(
    lambda x, keys, alpha, c: near.early_attack(
        net, x, keys, alpha=alpha, std=0.5, c=c, rate=0.05, most=300, least=20
    )
)
KEYS = jax.random.split(jax.random.key(3), B)


def test_early_success_is_seen_by_a_fresh_pass_and_needs_no_company():
    found = early(IMAGES, KEYS, 0.1, 50.0)
    fresh, y = net64(np.asarray(found.images)).argmax(-1), CLEAN[-1].argmax(-1)
    passed = (fresh[:2] != y).all(0) & (fresh[2] == y)
    np.testing.assert_array_equal(found.hit, passed)
    assert passed.sum() >= 2 and np.asarray(found.when)[passed].min() >= 20
    moved = np.asarray(found.images) - IMAGES
    np.testing.assert_allclose(found.distance, np.sqrt((moved**2).sum((1, 2, 3))), rtol=1e-5)
    for i in range(B):  # in other company
        others = np.where(np.arange(B)[:, None, None, None] == i, IMAGES, np.float32(0.5))
        again = early(others, KEYS, 0.1, 50.0)
        np.testing.assert_allclose(found.images[i], again.images[i], atol=1e-6)
        assert found.when[i] == again.when[i]


def test_without_weight_the_image_itself_is_found():
    far = jax.jit(
        lambda x, keys: near.early_attack(
            lambda p: 0.0 * net(p), x, keys, alpha=1.0, std=0.5, c=0.0, most=1000, least=999
        )
    )
    found = far(IMAGES, KEYS)
    assert (np.asarray(found.distance) ** 2 / 0.25 < 1e-4).all()


def test_two_exits_and_no_alpha_is_descent_on_the_first():
    """Ten steps of Adam in float64 on c p_y + |x - x'|^2 / std^2, gradients by central differences."""
    two = lambda x: net(x)[jnp.asarray([0, 2])]
    run = jax.jit(
        lambda x, keys: near.early_attack(
            two, x, keys, alpha=0.0, std=0.5, c=5.0, rate=0.05, most=11, least=10
        )
    )
    found = run(IMAGES[:1], KEYS[:1])
    y = CLEAN[-1, 0].argmax()

    def loss(w):
        x = (np.tanh(w) + 1) / 2
        p = softmax(net64(x)[0, 0])[y]
        return 5.0 * p + (((x - IMAGES[:1]) / 0.5) ** 2).sum()

    w = np.asarray(jax.random.uniform(KEYS[0], IMAGES.shape[1:]), np.float64)[None]
    m, v = np.zeros_like(w), np.zeros_like(w)
    for step in range(1, 11):
        g = np.zeros_like(w)
        for place in np.ndindex(w.shape):
            unit = np.zeros_like(w)
            unit[place] = 1e-5
            g[place] = (loss(w + unit) - loss(w - unit)) / 2e-5
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - 0.05 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(found.images, (np.tanh(w) + 1) / 2, atol=1e-4)
    assert int(found.when[0]) == 10


def test_a_batch_is_attacked_one_by_one():
    whole = attacked(IMAGES, SAID, 0.2)
    one = jax.vmap(lambda x, y: attacked(x[None], y[None], 0.2))(IMAGES, SAID)
    np.testing.assert_allclose(whole.images, one.images[:, 0], atol=1e-6)
    np.testing.assert_array_equal(whole.when, one.when[:, 0])


def test_pixels_are_normalised_in_between():
    seen = box.on_pixels(lambda x: x, (0.5, 0.25), (0.5, 2.0))(jnp.full((1, 1, 1, 2), 0.75))
    np.testing.assert_allclose(seen[0, 0, 0], [0.5, 0.25])


def test_unknown_options_are_refused(unchecked):
    with pytest.raises(DyncompError, match="'taken'"):
        box.Victim(net, aim="first")  # type: ignore[arg-type]
    with pytest.raises(DyncompError, match="'entropy'"):
        box.slow_down(DYNAMIC, IMAGES, eps=0.1, step=0.1, steps=1, objective="kl")  # type: ignore[arg-type]
    with pytest.raises(DyncompError, match="'image'"):
        near.early_attack(net, IMAGES, KEYS, alpha=1.0, std=1.0, start="here")  # type: ignore[arg-type]
    with pytest.raises(DyncompError, match="least=9"):
        near.early_attack(net, IMAGES, KEYS, alpha=1.0, std=1.0, most=9, least=9)
