import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dyncomp import attention, experts, models, routers
from dyncomp.core.errors import DyncompError
from dyncomp.core.sharding import axis_rules, constrain, local_op, to_spec
from dyncomp.parallel import RULES, MeshSpec, check_batch, logical_names, make_rules, use
from dyncomp.parallel.shardings import batch_sharding, make_global_batch, shardings_for


def test_sizes_fill_the_rest():
    ones = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1, "expert": 1}
    assert MeshSpec(fsdp=2).sizes(8) == {**ones, "data": 4, "fsdp": 2}
    assert MeshSpec(data=2, tensor=4).sizes(8) == {**ones, "data": 2, "tensor": 4}
    assert MeshSpec(sequence=4).sizes(8) == {**ones, "data": 2, "sequence": 4}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MeshSpec(fsdp=0), "MeshSpec.fsdp=0"),
        (lambda: MeshSpec(fsdp=-1), "data and fsdp are -1"),
        (lambda: MeshSpec(tensor=3).sizes(4), "4 devices are not a multiple of 3"),
        (lambda: MeshSpec(data=2, fsdp=4).sizes(4), "needs 8 devices but there are 4"),
        (lambda: check_batch(6, MeshSpec().build()), "batch size 6 is not a multiple of 4"),
        (lambda: make_rules({"mlp": "model"}), "no mesh axis 'model'"),
    ],
)
def test_errors_come_early_in_one_line(make, said):
    with pytest.raises(DyncompError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_specs_use_a_mesh_axis_once_and_refuse_typos():
    with axis_rules(RULES):
        assert to_spec(("batch", "seq", "embed")) == PartitionSpec(
            ("data", "fsdp", "expert"), "sequence", None
        )
        assert to_spec(("expert", "embed", "mlp")) == PartitionSpec(
            "expert", ("fsdp", "sequence"), "tensor"
        )
        with pytest.raises(DyncompError, match="'embde' is not in the table"):
            to_spec(("embde",))
    assert to_spec(("anything",)) == PartitionSpec(None)  # no mesh, no table


def test_overrides_change_one_entry():
    rules = make_rules({"seq": "tensor", "kv_heads": None})
    assert rules["seq"] == "tensor" and rules["kv_heads"] is None and rules["mlp"] == RULES["mlp"]


def shipped_models():
    """One of every kind of model and part."""
    block = functools.partial(
        models.Block, mixer=functools.partial(attention.Attention, heads=4, bias=True), ffn=None
    )
    router = functools.partial(routers.TopP, p=0.4)
    moe = functools.partial(experts.MoE, router=router, num_experts=4, hidden=8)
    units = [functools.partial(f, hidden=8) for f in (experts.SwiGLU, experts.MLP)] + [moe]
    groups = [models.Group([functools.partial(block, ffn=unit) for unit in units], 2)]
    lm = models.DecoderLM(vocab_size=8, d_model=8, groups=groups)
    vit = models.VisionTransformer(classes=4, patch=2, d_model=8, groups=groups[:1])
    return [(lm, jnp.zeros((4, 4), jnp.int32)), (vit, jnp.zeros((4, 4, 4, 1)))]


@pytest.mark.parametrize("which", [0, 1])
def test_every_name_of_every_part_is_in_the_table(which):
    model, inputs = shipped_models()[which]
    mesh = MeshSpec(fsdp=2).build()
    with use(mesh):  # constraints and local_ops look their names up too
        boxed = jax.eval_shape(model.init, jax.random.key(0), inputs)
    named = {name for names, _ in logical_names(boxed).values() for name in names if name}
    assert named <= set(RULES)
    assert {"embed", "mlp", "heads", "layers"} <= named


def test_moments_follow_parameters_and_scalars_are_whole():
    from flax import linen as nn

    boxed = {
        "params": {"ffn": {"up": nn.LogicallyPartitioned(jnp.zeros((8, 6)), ("embed", "mlp"))}}
    }
    weight = jax.ShapeDtypeStruct((8, 6), jnp.float32)
    state = {
        "params": {"ffn": {"up": weight}},
        "opt": [
            {
                "mu": {"ffn": {"up": weight}},
                "row": {"ffn": {"up": jax.ShapeDtypeStruct((8,), "float32")}},
            }
        ],
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    mesh = MeshSpec(fsdp=2, tensor=2).build()
    placed, batch = shardings_for(boxed, state, mesh)
    split, whole = PartitionSpec(("fsdp", "sequence"), "tensor"), PartitionSpec()
    assert placed["params"]["ffn"]["up"].spec == split
    assert placed["opt"][0]["mu"]["ffn"]["up"].spec == split
    assert placed["opt"][0]["row"]["ffn"]["up"].spec == whole  # another shape: factored moments
    assert placed["step"].spec == whole
    assert batch.spec == PartitionSpec(("data", "fsdp", "expert"))
    with pytest.raises(
        DyncompError, match="'mlp' has 6 entries, not a multiple of mesh axis tensor=4"
    ):
        shardings_for(boxed, state, MeshSpec(tensor=4).build())


def test_global_batch_keeps_values_and_checks_its_size():
    mesh = MeshSpec(fsdp=2).build()
    batch = {"inputs": np.arange(24).reshape(8, 3)}
    whole = make_global_batch(batch, mesh)["inputs"]
    np.testing.assert_array_equal(whole, batch["inputs"])
    assert {shard.data.shape for shard in whole.addressable_shards} == {(2, 3)}
    with pytest.raises(DyncompError, match="batch size 6"):
        make_global_batch({"inputs": np.zeros((6, 3))}, mesh)


@functools.partial(jax.custom_vjp)
def matmul(x, w):
    return x @ w


matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


def test_local_op_sums_the_gradient_of_whole_arguments():
    """A custom gradient knows nothing of devices; each sees a quarter of the rows."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(8, 3)).astype("f"), rng.normal(size=(3, 5)).astype("f")

    def loss(x, w):
        def local(x, w):
            y = jax.lax.platform_dependent(x, w, tpu=matmul, default=matmul)
            return y, jnp.full((1,), x.shape[0])

        y, rows = local_op(local, [("rows", None), (None, None)], (("rows", None), ("rows",)))(x, w)
        return jnp.sum(y**2), rows

    with use(MeshSpec(fsdp=2).build()):
        (value, rows), (dx, dw) = jax.jit(
            jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1), has_aux=True)
        )(x, w)
    np.testing.assert_allclose(value, np.sum((x @ w) ** 2), rtol=1e-5)
    np.testing.assert_allclose(dx, 2 * (x @ w) @ w.T, rtol=1e-4)
    np.testing.assert_allclose(dw, 2 * x.T @ (x @ w), rtol=1e-4)
    assert rows.tolist() == [2, 2, 2, 2]
    (_, rows), _ = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w)
    assert rows.tolist() == [8]  # no mesh: one piece


def test_constrain_places_and_is_identity_inside_a_local_op():
    mesh = MeshSpec().build()
    x = jnp.ones((8, 4))
    with use(mesh):
        y = jax.jit(lambda x: constrain(x, ("batch", "embed")))(x)
        inner = local_op(
            lambda x: constrain(x, ("batch", None)), [("batch", None)], ("batch", None)
        )
        np.testing.assert_array_equal(jax.jit(inner)(x), x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data")), 2)
    assert constrain(x, ("batch", "embed")) is x
    assert batch_sharding(mesh).is_equivalent_to(NamedSharding(mesh, PartitionSpec("data")), 2)


def test_a_mesh_of_the_users_own_and_sizes_that_do_not_divide():
    """Rules name axes that such a mesh lacks; a batch that is not split evenly is padded, a dimension of 1 whole."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    with use(mesh):
        for shape in ((6, 3, 8), (1, 3, 8), (3, 1, 8)):
            y = jax.jit(lambda x: constrain(x, ("batch", "seq", "mlp")))(jnp.ones(shape))
            np.testing.assert_array_equal(y, 1.0)
    with use(MeshSpec(data=1, fsdp=4).build()):
        alone = jax.jit(lambda x: constrain(x, ("batch", "seq", "embed")))(jnp.ones((1, 3, 8)))
    assert alone.sharding.is_fully_replicated
