"""Experts on eight devices against one, with the plan replayed; what is sent, counted in the compiled program.

The suite simulates four devices, so the file runs itself again in a process with eight.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dyncomp.core import dispatch
from dyncomp.core.errors import DyncompError
from dyncomp.core.plans import RoutePlan
from dyncomp.core.sharding import to_spec
from dyncomp.experts import Exchange, MLPBank, MoE, SwiGLUBank
from dyncomp.experts.adaptive import ExchangeChooser, SwitchingStep
from dyncomp.experts.exchange import bytes_each_way, layout
from dyncomp.parallel import MeshSpec, hlo, use
from dyncomp.routers import TopK

DEVICES = 8
eight = pytest.mark.skipif(len(jax.devices()) < DEVICES, reason="runs in a process of its own")
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

N, D, F, E, K = 64, 6, 8, 8, 2
SHARED = MeshSpec(expert=4, tensor=2)  # W = 4, G = 2
MESHES = {
    "shared": SHARED,
    "one each": MeshSpec(expert=8),
    "with data and fsdp": MeshSpec(data=2, fsdp=2, expert=2),
    "few owners": MeshSpec(expert=2, tensor=4),
}


@pytest.mark.skipif(len(jax.devices()) >= DEVICES, reason="this is that process")
def test_in_a_process_with_eight_devices():
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


def inputs(bank_class=SwiGLUBank):
    """Rows, combine weights, a bank, and a lopsided plan with unused slots (an expert nobody chose, too)."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    liking = np.array([5.0, 3, 2, 1, 1, 1, 0.5, 0]) / 13.5
    experts = np.stack([rng.choice(E, K, replace=False, p=liking) for _ in range(N)])
    keep = rng.random((N, K)) < 0.9
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    if bank_class is MLPBank:
        shapes = {"up": (E, D, F), "up_bias": (E, F), "down": (E, F, D), "down_bias": (E, D)}
    bank = {name: 0.4 * draw(*shape) for name, shape in shapes.items()}
    return draw(N, D), jnp.abs(draw(N, K)), bank, jnp.asarray(experts, jnp.int32), jnp.asarray(keep)


def make_moe(kind, **options):
    router = functools.partial(TopK, k=K)
    return MoE(router=router, num_experts=E, hidden=F, dispatch=kind, **options)


def loss(moe, x, weights, bank, experts, keep):
    plan = RoutePlan(experts, jnp.where(keep, weights, 0.0), keep)
    y, executed, dropped = moe._run(plan, x, moe.bank(**bank))
    return jnp.sum(jnp.sin(y)), (y, executed, dropped)


def compiled(moe, given):
    fn = jax.value_and_grad(functools.partial(loss, moe), argnums=(0, 1, 2), has_aux=True)
    return jit(fn).lower(*given).compile()


@functools.cache
def alone(bank_class):
    given = inputs(bank_class)
    (_, aux), grads = compiled(make_moe("dropless", bank=bank_class), given)(*given)
    return jax.device_get((aux[0], grads))


def close(a, b):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, atol=1e-5), a, b)


CASES = [
    *(
        ("shared", "dropless", r, d, SwiGLUBank)
        for r, d in ((0, 1), (1, 1), (2, 1), (1, 2), (2, 4))
    ),
    *(("shared", "capacity", r, d, MLPBank) for r, d in ((0, 1), (1, 2), (2, 1), (2, 2), (1, 4))),
    ("shared", "dropless", 2, 2, MLPBank),
    ("one each", "dropless", 1, 2, SwiGLUBank),
    ("with data and fsdp", "dropless", 1, 1, MLPBank),
    ("with data and fsdp", "capacity", 1, 2, SwiGLUBank),
    ("few owners", "dropless", 2, 1, MLPBank),  # a ring: slices gathered and rows repeated
    ("few owners", "capacity", 2, 2, MLPBank),
]


@eight
@pytest.mark.parametrize(("mesh", "kind", "r", "d", "bank_class"), CASES)
def test_eight_devices_give_what_one_gives(mesh, kind, r, d, bank_class):
    given = inputs(bank_class)
    y, grads = alone(bank_class)
    moe = make_moe(
        kind, bank=bank_class, capacity_factor=8.0, exchange=Exchange(slices=r, chunks=d)
    )
    with use(MESHES[mesh].build()):
        program = compiled(moe, given)
        (_, (got, executed, dropped)), theirs = program(*given)
    close(got, y)
    close(theirs, grads)
    assert int(dropped) == 0 and int(executed) >= int(np.sum(given[-1]))
    sent = hlo.collectives(program.as_text()).get("all-to-all", hlo.Traffic())
    assert (sent.bytes > 0) == (r > 0)


@eight
def test_what_is_dropped_does_not_depend_on_slices_or_chunks():
    """Eight slots an expert divide by every d (the sheet's property 8)."""
    given, outputs = inputs(), []
    for r, d in ((0, 1), (1, 2), (2, 4)):
        moe = make_moe("capacity", capacity_slots=4, exchange=Exchange(slices=r, chunks=d))
        with use(SHARED.build()):
            (_, (y, executed, dropped)), _ = compiled(moe, given)(*given)
        outputs.append((jax.device_get(y), int(executed), int(dropped)))
    for y, executed, dropped in outputs[1:]:
        close(y, outputs[0][0])
        assert (executed, dropped) == outputs[0][1:]
    assert dropped > 0 and executed == 4 * E * 8  # 4 slots, e experts, 8 devices


@eight
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("kind", ["capacity", "dropless"])
def test_bytes_are_those_of_the_formula(kind, chunks):
    """Two all-to-alls going forward and two coming back; 8 rows a device, 2 experts on each of 4 owners."""
    given, slots = inputs(), 5
    moe = make_moe(kind, capacity_slots=slots, exchange=Exchange(chunks=chunks))
    with use(SHARED.build()):
        where = layout(moe.exchange, E)
        sent = hlo.collectives(compiled(moe, given).as_text())["all-to-all"]
    if kind == "capacity":
        rounded, counts = {1: 5, 3: 6}[chunks], 0
        each = E * rounded * D * 4
    else:
        rounded, counts = {1: 16, 3: 18}[chunks], E * 4  # 8 rows, both choices may go to one owner
        each = 4 * rounded * D * 4
    assert sent.bytes == 4 * each + counts
    slots = slots if kind == "capacity" else None
    whole, leaves = bytes_each_way(where, N // 8, K, D, 4, num_experts=E, slots=slots)
    assert (whole, leaves) == (each, each * 3 // 4)


@eight
def test_two_steps_equal_one():
    given = inputs()
    y, grads = alone(SwiGLUBank)
    moe = make_moe("dropless", exchange=Exchange(inner=2))
    with use(MESHES["one each"].build()):
        program = compiled(moe, given)
        (_, (got, _, _)), theirs = program(*given)
        sent = hlo.collectives(program.as_text())["all-to-all"]
    close(got, y)
    close(theirs, grads)
    assert sent.bytes == 2 * 4 * (8 * 8 * D * 4) + E * 4  # 8 rows to each of 8 owners


@eight
def test_a_bound_on_pairs_drops_what_is_above_it_and_counts_it():
    x, weights, bank, experts, keep = inputs()
    moe = make_moe("dropless", exchange=Exchange(pair_factor=1.0))
    with use(SHARED.build()):
        _, (got, _, dropped) = jit(functools.partial(loss, moe))(x, weights, bank, experts, keep)
    served = np.asarray(keep).copy()  # by hand: 8 rows x 2 choices / 4 owners = 4 places a pair
    for device in range(8):
        room = dict.fromkeys(range(4), 4)
        for row in range(8 * device, 8 * device + 8):
            for slot in range(K):
                owner = int(experts[row, slot]) // 2
                if served[row, slot]:
                    served[row, slot] = room[owner] > 0
                    room[owner] -= 1
    assert int(dropped) == int(np.sum(keep) - served.sum()) > 0
    plan = RoutePlan(experts, jnp.where(served, weights, 0.0), jnp.asarray(served))
    close(got, dispatch.mask(plan, x, moe.bank(**bank), E)[0])


@eight
def test_free_experts_stay_where_they_are():
    """Experts without a network enter no exchange; the whole layer agrees with one device."""
    import flax.linen as nn

    moe = MoE(
        router=functools.partial(TopK, k=2), num_experts=4, hidden=F, free=("copy", "constant")
    )
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 3, D)), jnp.float32)
    variables = nn.unbox(jax.jit(moe.init)(jax.random.key(0), x))
    y, aux = jit(moe.apply)(variables, x)
    with use(SHARED.build()):
        program = jit(moe.apply).lower(variables, x).compile()
        got, theirs = program(variables, x)
        sent = hlo.collectives(program.as_text())["all-to-all"]
    close(got, y)
    assert sent.bytes == 2 * 4 * (6 * 1) * D * 4 + 4 * 4  # 6 rows, one expert an owner
    assert int(theirs.events["experts"]["rows"].needed) == int(aux.events["experts"]["rows"].needed)
    close(theirs.losses, aux.losses)


@eight
def test_switching_moves_no_weight():
    """Steps for r = 0, 1, 2 in turn over one set of parameters that never leave their devices."""
    x, weights, bank, experts, keep = inputs(MLPBank)
    mesh = SHARED.build()
    with use(mesh):
        names = MLPBank.axes
        place = {n: NamedSharding(mesh, to_spec(names[n])) for n in bank}
    made = []

    def make(setting, slots):
        moe = make_moe("capacity", bank=MLPBank, capacity_slots=slots, exchange=setting)

        def step(bank):
            grads, (_, _, dropped) = jax.grad(
                lambda bank: loss(moe, x, weights, bank, experts, keep), has_aux=True
            )(bank)
            return jax.tree.map(lambda w, g: w - 0.01 * g, bank, grads), dropped

        with use(mesh):
            jitted = jax.jit(step, out_shardings=(place, None), donate_argnums=0)
            program = jitted.lower(state).compile()
        made.append((setting, program.input_shardings[0][0]))
        return program

    chooser = ExchangeChooser((0, 1, 2), (1, 2), bucket=8)
    step, state = SwitchingStep(make, chooser), jax.device_put(bank, place)
    for _ in range(8):
        state, dropped = step(5, state)
        assert int(dropped) == 0
    assert {setting.slices for setting, _ in made} == {0, 1, 2}
    for _, shardings in made:
        assert all(shardings[n].is_equivalent_to(place[n], bank[n].ndim) for n in bank)
    want = bank
    plain = make_moe("dropless", bank=MLPBank)
    for _ in range(8):
        g = jit(jax.grad(lambda b: loss(plain, x, weights, b, experts, keep)[0]))(want)
        want = jax.tree.map(lambda w, g: w - 0.01 * g, want, g)
    close(jax.device_get(state), want)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(DyncompError, match=r"pair_factor=0.0"):
        Exchange(pair_factor=0.0)
    with pytest.raises(DyncompError, match=r"chunks=0"):
        Exchange(chunks=0)
    assert layout(Exchange(), E) is None  # no mesh
    with use(MeshSpec(expert=2, tensor=2, data=-1).build()):
        assert layout(Exchange(slices=0), E) is None
        with pytest.raises(DyncompError, match="slices=3 does not divide the 2"):
            layout(Exchange(slices=3), E)
        with pytest.raises(DyncompError, match="7 experts on 2 devices"):
            layout(Exchange(), 7)
        with pytest.raises(DyncompError, match="inner=4 does not divide 2"):
            layout(Exchange(inner=4), E)
