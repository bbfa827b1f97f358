"""What a program's operations multiply and move, against numbers by hand."""

import pytest

from dyncomp.parallel import hlo, ops

TEXT = """\
HloModule m, num_partitions=4

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %limit = s32[] constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%layer (p0: bf16[24,64,128], p1: s32[], p2: bf16[8,64]) -> bf16[8,128] {
  %p0 = bf16[24,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %p2 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %ds = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %p1, %p1), dynamic_slice_sizes={1,64,128}
  %w = bf16[64,128]{1,0:T(8,128)(2,1)} bitcast(%ds)
  ROOT %y = bf16[8,128]{1,0:T(8,128)(2,1)} convolution(%p2, %w), dim_labels=bf_io->bf
}

%keep (q0: f32[5,8,128], q1: f32[1,8,128], q2: s32[]) -> f32[5,8,128] {
  %q0 = f32[5,8,128]{2,1,0} parameter(0)
  %q1 = f32[1,8,128]{2,1,0} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %u = f32[5,8,128]{2,1,0} dynamic-update-slice(%q0, %q1, %q2, %q2, %q2)
}

%body (b: (s32[], bf16[24,64,128])) -> (s32[], bf16[24,64,128]) {
  %b = (s32[], bf16[24,64,128]) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%b), index=0
  %stack = bf16[24,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%b), index=1
  %x = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} custom-call(%i.1), custom_call_target="AllocateBuffer"
  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%stack, %i.1, %x), kind=kOutput, calls=%layer, META
  %old = f32[5,8,128]{2,1,0} broadcast(%i.1), dimensions={}
  %new = f32[1,8,128]{2,1,0} broadcast(%i.1), dimensions={}
  %fusion.2 = f32[5,8,128]{2,1,0} fusion(%old, %new, %i.1), kind=kLoop, calls=%keep
  ROOT %t = (s32[], bf16[24,64,128]) tuple(%i.1, %stack)
}

ENTRY %main (a: f32[8]) -> f32[] {
  %a = f32[8]{0} parameter(0)
  %w.1 = (s32[], bf16[24,64,128]) while(%a), condition=%cond, body=%body
  %copy-start = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = f32[1024]{0:T(1024)S(1)} copy-done(%copy-start)
  %gather = f32[32]{0} all-gather(%a), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %my_kernel.7 = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", ESTIMATE
}
""".replace(
    "META", 'metadata={op_name="jit(step)/mlp"}, backend_config={"estimated_cycles":"77"}'
).replace("ESTIMATE", 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000"}}}')


@pytest.fixture(scope="module")
def found():
    return {each.name: each for each in ops.operations(TEXT)}


def test_a_product_in_a_loop_reads_one_slice_a_run(found):
    product = found["fusion.1"]
    assert (product.kind, product.source) == ("product", "jit(step)/mlp")
    # One of 24 matrices [64 128] in bfloat16 and a counter are read, [8 128] is written; x lies on the chip.
    moved = 64 * 128 * 2 + 4 + 8 * 128 * 2
    assert product.work == ops.Work(1, 5, 5 * 2 * 8 * 64 * 128, 5 * moved, 5 * 77)


def test_an_update_in_place_moves_the_update_alone(found):
    one = 8 * 128 * 4
    assert found["fusion.2"].work.bytes == 5 * (one + 4 + one)
    assert found["fusion.2"].kind == "move"


def test_a_copy_onto_the_chip_reads_once(found):
    assert found["copy-start"].work.bytes == 1024 * 4
    assert "copy-done" not in found and "gather" not in found


def test_a_kernel_says_its_flops(found):
    assert (found["my_kernel.7"].kind, found["my_kernel.7"].work.flops) == ("kernel", 1000)
    assert ops.by_kind(list(found.values()))["kernel"].sites == 1


@pytest.mark.parametrize(
    ("sizes", "window", "pairs"),
    [
        ((5, 3, 5), "size=3 pad=1_1", 13),  # the ends miss one each
        ((4, 4, 4), "size=4 pad=3_3 rhs_reversal=1", 10),  # padded on both sides: 1 + 2 + 3 + 4
        ((1, 4, 4), "size=4 pad=3_3 rhs_reversal=1", 4),  # heads as a window: one each
        ((4, 4, 4), "size=4 stride=3 pad=0_0 lhs_dilate=4", 4),  # a batch as a window
        ((8, 2, 4), "size=2 stride=2", 8),
    ],
)
def test_positions_where_a_window_meets_input(sizes, window, pairs):
    assert ops._positions(sizes, ops._window(f"window={{{window}}}"), 0) == pairs


def test_flops_of_a_convolution_are_xlas():
    import jax
    import jax.numpy as jnp

    shapes = (
        jax.ShapeDtypeStruct((2, 9, 9, 4), "float32"),
        jax.ShapeDtypeStruct((3, 3, 4, 8), "float32"),
    )
    names = ("NHWC", "HWIO", "NHWC")
    layer = lambda x, w: jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=names)
    lowered = jax.jit(layer).lower(*shapes)
    (line,) = [x for x in lowered.as_text("hlo").splitlines() if " convolution(" in x]
    made = ops._convolution_flops(line, [2, 9, 9, 4], [3, 3, 4, 8], [2, 5, 5, 8])
    assert made == lowered.cost_analysis()["flops"] and jnp.isfinite(made)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=2,'b'=8] {'b':(1)2}", 2),
    ],
)
def test_how_many_devices_take_part(groups, size):
    assert hlo._group(f"all-gather(%x), replica_groups={groups}, dimensions={{0}}", 64) == size
