"""Look-once eviction and cluster selection: what is kept and read, against brute force; everything kept is dense."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import Attention, ClusterSelection, truncate
from dyncomp.attention.cluster_cache import boxed, evicted, tuned
from dyncomp.attention.cluster_selection import slots_of
from dyncomp.core.errors import DyncompError
from dyncomp.decoding import Generator, Session
from dyncomp.experts import SwiGLU
from dyncomp.models import Block, DecoderLM, Group, apply
from dyncomp_kernels.decode_attention.api import decode_attention

B, T, D, H, G, P = 2, 40, 16, 4, 2, 4
DENSE = [("linear", 4), ("linear", None), ("bound", 4), ("mean", None)]
ALL = {"kept": 1.0, "share": 1.0, "coarse_share": 1.0, "cluster": 2, "coarse": 4}


def layer(**options):
    """A mixer with a policy, its parameters (the same whatever the policy) and an input."""
    make = functools.partial(ClusterSelection, **{**ALL, **options})
    module = Attention(heads=H, kv_heads=G, rope_theta=50.0, cache=make)
    x = 2 * jax.random.normal(jax.random.key(0), (B, T, D))
    return module, nn.unbox(jax.jit(module.init)(jax.random.key(1), x)), x


def read(module, params, x, prompt, mask=None, length=T):
    """Outputs of a prompt and of single steps, and the last state."""
    call = jax.jit(lambda x, m, c: module.apply(params, x, mask=m, cache=c))
    y, aux = call(
        x[:, :prompt], None if mask is None else mask[:, :prompt], module.init_cache(D, B, length)
    )
    outputs = [y]
    for place in range(prompt, x.shape[1]):
        step = slice(place, place + 1)
        y, aux = call(x[:, step], None if mask is None else mask[:, step], aux.cache)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), aux


def filled(count=T, seed=5, g=G, **options):
    """A state with ``count`` tokens of each row, made from drawn keys alone."""
    policy = ClusterSelection(max_length=T, **{**ALL, **options})
    state = policy.init(B, g, P)
    drawn = jax.random.normal(jax.random.key(seed), (2, B, T, g, P))
    used = jnp.arange(T) < count
    keys, values = jnp.where(used[:, None, None], drawn, 0.0)
    counts = jnp.full((B,), count, jnp.int32)
    places = jnp.broadcast_to(jnp.where(used, jnp.arange(T, dtype=jnp.int32), -1), (B, T))
    return boxed(
        dataclasses.replace(state, keys=keys, values=values, positions=places, count=counts)
    )


@jax.jit
def select(state, q):
    return state.policy.select(state, q)


def queries(seed=3):
    return jax.random.normal(jax.random.key(seed), (B, H, P))


@pytest.mark.parametrize(("score", "coarse"), DENSE)
def test_everything_kept_is_dense(score, coarse):
    module, params, x = layer(coarse=coarse, score=score)
    full, _ = module.clone(cache=Attention(heads=H).cache).apply(params, x)
    got, aux = read(module, params, x, 37)
    np.testing.assert_allclose(got, full, rtol=2e-5, atol=2e-6)
    assert aux.cache.positions.tolist() == [list(range(T))] * B


def test_everything_kept_reads_all_slots_in_their_order():
    """Bit for bit what attention over the whole list gives (property 1)."""
    state, q = filled(), queries()
    index, seen, _ = select(state, q)
    slots, held = slots_of(index, seen, state.count, 2)
    got = decode_attention(q, state.keys, state.values, slots, held)
    every = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, G, T))
    want = decode_attention(q, state.keys, state.values, every, jnp.ones((B, G, T), bool))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def brute(keys, q, size, alpha, count, take, forced, limit=10**9):
    """Clusters that one key/value head's queries [r p] read, by sorting in float64."""
    clusters = [keys[i : min(i + size, count)] for i in range(0, count, size)]
    scores = []
    for cluster in clusters:
        centre = alpha * cluster.max(0) + (1 - alpha) * cluster.min(0)
        scores.append(float((q @ centre).sum()))
    order = sorted(range(len(clusters)), key=lambda i: -scores[i])
    first = sorted({0, len(clusters) - 1} if forced else {0})
    wanted = first + [i for i in order if i not in first]
    return sorted((set(order[:take]) | set(first)) & set(wanted[:limit])), scores


@pytest.mark.parametrize("limit", [3, 30])
def test_flat_selection_is_top_k_and_the_ends(limit):
    state, q = tuned(filled(coarse=None, cluster=3, share=0.4), clusters=limit), queries()
    index, seen, scored = select(state, q)
    total = math.ceil(T / 3)
    assert int(scored) == total
    for row in range(B):
        for head in range(G):
            keys = np.asarray(state.keys[row, :, head], np.float64)
            own = np.asarray(q[row, 2 * head : 2 * head + 2], np.float64)
            want, _ = brute(keys, own, 3, 0.6, T, int(0.4 * total), True, limit)
            assert index[row, head][seen[row, head]].tolist() == want


def test_winners_are_children_of_winners():
    """Property 4, with a share of all clusters above that of the coarse ones."""
    state, q = filled(share=0.8, coarse_share=0.3), queries()
    index, seen, _ = select(state, q)
    for row in range(B):
        for head in range(G):
            keys = np.asarray(state.keys[row, :, head], np.float64)
            own = np.asarray(q[row, 2 * head : 2 * head + 2], np.float64)
            coarse, _ = brute(keys, own, 4, 0.6, T, int(0.3 * 10), True)
            allowed = {2 * i + j for i in coarse for j in (0, 1)}
            got = set(index[row, head][seen[row, head]].tolist())
            # As many as there are candidates: 16 of 20 clusters were asked for.
            assert got == allowed and len(allowed) <= 2 * (3 + 2)


def test_whole_first_level_is_the_flat_form():
    """Property 5."""
    found = [select(filled(coarse=coarse, share=0.3), queries())[:2] for coarse in (4, None)]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_clusters_of_one_token_are_exact_top_k():
    """Property 7: with one query a list, the best tokens by q.k and the two ends."""
    state = filled(cluster=1, coarse=None, share=0.2)
    q = jax.random.normal(jax.random.key(3), (B, G, P))
    for change in ({}, {"alpha": 0.1}):
        index, seen, _ = select(tuned(state, **change), q)
        for row in range(B):
            for head in range(G):
                products = np.asarray(state.keys[row, :, head]) @ np.asarray(q[row, head])
                want = set(np.argsort(-products)[:8].tolist()) | {0, T - 1}
                assert set(index[row, head][seen[row, head]].tolist()) == want


def test_the_code_s_rule_may_hide_the_newest_token():
    for length, own in ((40, False), (39, True)):
        for last, there in (("partial", own), ("always", True)):
            state = filled(length, last=last, share=0.1, coarse_share=0.1)
            # A query that points away from the newest cluster.
            worst = -100 * jnp.repeat(state.fine.centre[:, (length - 1) // 2], 2, axis=1)
            index, seen, _ = select(state, worst)
            newest = jnp.any(seen & (index == (length - 1) // 2), axis=-1)
            assert bool(jnp.all(newest)) is there


def test_later_tokens_are_never_evicted_and_see_themselves():
    """Property 8; also when eviction comes late."""
    module, params, x = layer(kept=0.3, share=0.2, coarse_share=0.3)
    prompt = 25
    _, aux = read(module, params, x, prompt)
    kept = math.ceil(0.3 * prompt)
    for state in (aux.cache, evicted(aux.cache, 0.5)):
        positions = np.asarray(state.positions)
        for row in positions:
            assert set(range(prompt, T)) <= set(row.tolist())
    assert np.asarray(aux.cache.count).tolist() == [kept + T - prompt] * B
    assert np.asarray(state.count).tolist() == [math.ceil(0.5 * kept) + T - prompt] * B
    last = (int(aux.cache.count[0]) - 1) // 2
    assert np.all(np.any(np.asarray(aux.cache.clusters == last) & np.asarray(aux.cache.read), -1))


def test_late_eviction_is_early_eviction():
    """A prompt that was kept whole and is cut afterwards is the prompt that was cut at once."""
    module, params, x = layer(kept=0.5)
    early = read(module, params, x[:, :24], 24)[1].cache
    module, params, x = layer(kept=1.0)
    late = evicted(read(module, params, x[:, :24], 24)[1].cache, 0.5)
    for name in ("keys", "values", "positions", "count", "looked", "fine", "coarse"):
        for a, b in zip(
            jax.tree.leaves(getattr(early, name)), jax.tree.leaves(getattr(late, name)), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    """A padded row keeps and reads what the bare text does."""
    options = {"kept": 0.5, "share": 0.3, "coarse_share": 0.5}
    module, params, x = layer(**options)
    bare, alone = read(module, params, x[:, :30], 25)
    pad = 4
    gap = jnp.ones((B, pad, D))
    order = [gap, x[:, :25]] if side == "left" else [x[:, :25], gap]
    padded = jnp.concatenate([*order, x[:, 25:30]], axis=1)
    real = [jnp.zeros((B, pad)), jnp.ones((B, 25))]
    mask = jnp.concatenate([*(real if side == "left" else real[::-1]), jnp.ones((B, 5))], axis=1)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1).astype(jnp.int32) - 1, 0)
    cache = module.init_cache(D, B, T)
    start, outputs = 25 + pad, []
    _, aux = module.apply(params, padded[:, :start], positions[:, :start], mask[:, :start], cache)
    for place in range(start, 30 + pad):
        step = slice(place, place + 1)
        y, aux = module.apply(params, padded[:, step], positions[:, step], mask[:, step], aux.cache)
        outputs.append(y)
    np.testing.assert_allclose(
        jnp.concatenate(outputs, axis=1), bare[:, 25:30], rtol=2e-5, atol=2e-6
    )
    np.testing.assert_array_equal(aux.cache.clusters, alone.cache.clusters)


def test_rows_may_differ_and_padding_takes_no_slot():
    module, params, x = layer(kept=0.5)
    mask = jnp.asarray([[1] * 10 + [0] * 6, [1] * 16])
    _, aux = module.apply(params, x[:, :16], mask=mask, cache=module.init_cache(D, B, T))
    assert aux.cache.count.tolist() == [5, 8] and aux.cache.positions[0, 5:].tolist() == [-1] * 35
    cut = truncate(aux.cache, jnp.asarray([10, 16]))
    assert int(cut.length) == 16
    _, aux = module.apply(params, x[:, 16:17], mask=jnp.asarray([[0], [1]]), cache=cut)
    assert aux.cache.count.tolist() == [5, 9]
    np.testing.assert_array_equal(aux.cache.fine.high[0], cut.fine.high[0])


def test_truncating_takes_boxes_back():
    module, params, x = layer(kept=0.5)
    _, aux = read(module, params, x[:, :32], 25)
    want = read(module, params, x[:, :28], 25)[1].cache
    got = truncate(aux.cache, jnp.int32(28))
    for name in ("keys", "positions", "count", "length", "fine", "coarse"):
        for a, b in zip(
            jax.tree.leaves(getattr(got, name)), jax.tree.leaves(getattr(want, name)), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-6, err_msg=name)


def test_a_longer_pass_is_its_single_steps():
    module, params, x = layer(kept=0.5, share=0.3, coarse_share=0.5)
    steps, one = read(module, params, x[:, :33], 25)
    _, aux = module.apply(params, x[:, :25], cache=module.init_cache(D, B, T))
    y, aux = module.apply(params, x[:, 25:33], cache=aux.cache)
    np.testing.assert_allclose(y, steps[:, 25:], rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(aux.cache.clusters, one.cache.clusters)


def test_the_future_changes_nothing():
    module, params, x = layer(kept=0.5, share=0.3, coarse_share=0.5)
    other = x.at[:, 33].add(5.0)
    a, b = (read(module, params, text, 25)[0] for text in (x, other))
    np.testing.assert_array_equal(a[:, :33], b[:, :33])
    assert not np.array_equal(a[:, 33:], b[:, 33:])


def test_fewer_slots_hold_what_is_kept_and_overflow_is_nan():
    module, params, x = layer(kept=0.5, slots=20)
    y, aux = read(module, params, x[:, :33], 25)  # 13 kept and 8 later ones: one too many
    assert aux.cache.keys.shape[1] == 20
    assert np.isfinite(y[:, :32]).all() and np.isnan(y[:, 32]).all()
    with_room, _ = read(layer(kept=0.5)[0], params, x[:, :32], 25)
    np.testing.assert_allclose(y[:, :32], with_room, rtol=1e-5, atol=1e-6)


def test_run_time_budgets_compile_nothing(counting_jit):
    module, params, x = layer(share=0.9, coarse_share=0.9)
    _, aux = read(module, params, x[:, :30], 25)
    step, traces = counting_jit(lambda c, x: module.apply(params, x, cache=c))
    read_tokens = []
    for change in ({}, {"clusters": 4}, {"share": 0.2, "coarse": 0.4}):
        _, out = step(tuned(aux.cache, **change), x[:, 30:31])
        read_tokens.append(int(out.events["pairs"].needed) // B)
    assert len(traces) == 1 and read_tokens[0] > read_tokens[1] >= 2 * 3 + 1 and read_tokens[2] < 14


def test_ledger_counts_lists_and_summaries():
    """40 tokens in clusters of 2 and 4; 20 clusters, lists of 5 + 2; 10 coarse ones, lists of 4 + 2, 12 children."""
    module, params, x = layer(share=0.25, coarse_share=0.4)
    _, aux = read(module, params, x, T - 1)
    events = aux.events
    assert int(events["pairs"].executed) == B * 7 * 2
    assert int(events["scored"].executed) == B * (10 + 12)
    seen = slots_of(aux.cache.clusters, aux.cache.read, aux.cache.count, 2)[1]
    each = np.asarray(seen).sum(axis=(1, 2))
    assert int(events["pairs"].needed) == int(np.ceil(each / G).sum())
    prompt, first = module.apply(params, x[:, :30], cache=module.init_cache(D, B, T))
    assert int(first.events["pairs"].needed) == B * 30 * 31 // 2
    assert int(first.events["scored"].executed) == B * 64 * 30  # one piece of 64 queries


def stack(depth, layers, **options):
    make = functools.partial(
        ClusterSelection, **{**ALL, "share": 0.3, "coarse_share": 0.5, "kept": 0.6, **options}
    )
    mixer = functools.partial(Attention, heads=H, kv_heads=G, cache=make)
    block = functools.partial(Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=8))
    model = DecoderLM(vocab_size=11, d_model=D, groups=[Group([block], depth)], layers=layers)
    tokens = jax.random.randint(jax.random.key(0), (B, 20), 0, 11)
    return model, nn.unbox(jax.jit(model.init)(jax.random.key(1), tokens)), tokens


def decoded(model, variables, tokens, prompt=17):
    call = jax.jit(lambda t, c: apply(model, variables, t, cache=c))
    y, aux = call(tokens[:, :prompt], model.init_cache(B, 20))
    outputs = [y]
    for place in range(prompt, 20):
        y, aux = call(tokens[:, place : place + 1], aux.cache)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), aux


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize(("depth", "group", "first"), [(5, 2, 1), (6, 3, 2), (4, 1, 2)])
def test_layers_share_selections(layers, depth, group, first):
    """Property 9: selections = u + ceil((layers - u) / g); sharers keep and read the same."""
    model, variables, tokens = stack(depth, layers, share_group=group, share_from=first)
    _, aux = decoded(model, variables, tokens)
    blocks = aux.events["group_0"]["block_0"]["mixer"]
    scored = np.asarray(blocks["scored"].executed).ravel()
    assert (scored > 0).sum() == first + math.ceil((depth - first) / group)
    cache = aux.cache["group_0"]
    layer = lambda i: (
        jax.tree.map(lambda x: x[i], cache["layers"]["block_0"]["mixer"])
        if layers == "scan"
        else cache[f"layers_{i}"]["block_0"]["mixer"]
    )
    for i in range(first, depth):
        leader = layer(first + (i - first) // group * group)
        own = layer(i)
        assert int(own.layer) == (i if group > 1 else 0)
        for name in ("clusters", "read", "positions", "looked"):
            np.testing.assert_array_equal(getattr(own, name), getattr(leader, name))


def test_sharing_in_groups_of_one_is_no_sharing():
    results = [decoded(*stack(4, "scan", share_from=first))[0] for first in (0, 4)]
    alone = decoded(*stack(4, "scan", share_group=2, share_from=4))[0]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_allclose(alone, results[0], rtol=1e-5, atol=1e-6)


def test_sharing_needs_the_whole_stack():
    module, params, x = layer(share_group=2)
    with pytest.raises(DyncompError, match="share_group=1"):
        module.apply(params, x, cache=module.init_cache(D, B, T))


def test_bad_options_and_mixers_are_refused(unchecked):
    for wrong in (
        {"kept": 0.0}, {"alpha": 2.0}, {"coarse": 24}, {"coarse": 16}, {"cluster": 0, "coarse": None},
        {"score": "quest"}, {"share_group": 0},
    ):  # fmt: skip
        with pytest.raises(DyncompError, match="use"):
            ClusterSelection(max_length=8, **wrong)
    module, params, x = layer()
    with pytest.raises(DyncompError, match="FullCache"):
        module.clone(window=3).apply(params, x, cache=module.init_cache(D, B, T))


def driven(layers="unroll", **options):
    """A small model whose blocks have the policy, and ragged prompts."""
    model, variables, tokens = stack(2, layers, **options)
    prompts = [np.asarray(tokens[0, :9]).tolist(), np.asarray(tokens[1, :13]).tolist()]
    return model, variables, prompts


def test_a_generator_writes_what_a_full_cache_writes():
    texts = []
    for cache in (None, {"kept": 1.0, "share": 1.0, "coarse_share": 1.0}):
        model, variables, prompts = driven(**(cache or {}))
        if cache is None:
            model = plain(model)
        out = Generator(model, variables).generate(prompts, 4, capacity=40)
        texts.append([g.tokens for g in out])
    assert texts[0] == texts[1]


def test_a_session_s_rows_are_those_read_alone():
    """Prompts are padded on the right and cut back; eviction and selection are each row's own."""
    model, variables, prompts = driven(kept=0.5)
    together, alone = [], []
    session = Session(model, variables)
    session.open(prompts, 40)
    together = [session.step([[3], [5]]), session.step([[1], [2]])]
    for row, told in zip(prompts, ((3, 1), (5, 2)), strict=True):
        session = Session(model, variables)
        session.open([row], 40)
        alone.append([session.step([[t]])[0] for t in told])
    for row in range(2):
        for turn in range(2):
            np.testing.assert_allclose(together[turn][row], alone[row][turn], rtol=1e-4, atol=1e-5)


def plain(model):
    """The model with the default cache."""
    block = model.groups[0].blocks[0]
    mixer = functools.partial(Attention, heads=H, kv_heads=G)
    return model.clone(groups=[Group([functools.partial(block, mixer=mixer)], 2)])
