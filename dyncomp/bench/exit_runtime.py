"""Rows of `dyncomp bench exits` on 12 blocks of width 256: executors, a stream, PyTorch, overhead, latency.

`exit_nets` has the networks; the mean example runs a third of the blocks. Every network runs in a process of its own.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dyncomp.bench import exit_nets, exit_peer, fresh, timing
from dyncomp.bench.exit_nets import DEPTH, NETS, QUICK_DEPTH, Planted
from dyncomp.runtime import (
    CompactExecutor,
    Executed,
    HostExecutor,
    LaxExecutor,
    MaskedExecutor,
    StreamExecutor,
)

BATCH, QUICK_BATCH, PAIRS, QUICK_PAIRS = 64, 2, 30, 3
WARM_UP = 2
GOALS = {"host/64": 0.8, "host/1": 0.9, "stream": 0.9}
TORCH_GOAL, OVERHEAD_GOAL = 1.0, 1.03
LOADS = (0.5, 0.8)
"""Of the stream's own throughput, for the latencies."""
ARRIVALS, MAX_WAIT = 600, 0.05

REALISED = "(seconds full / seconds with exits) / (FLOPs full / FLOPs needed): {how}, {net}, mean exit at a third"
AGAINST = "seconds of PyTorch with boolean compaction / ours: {how}, {net}"
PLAIN = "seconds of PyTorch / of XLA: the network without exits, batch 64, {net}"
OVERHEAD = "seconds with exits of which nobody takes one / seconds of the network without exits: batch 64, {net}"
WAITS = "p95 seconds from arrival to output / those of a server of fixed depth and equal mean compute, load {load}"


def rows(quick: bool) -> list[dict[str, Any]]:
    """All rows of both networks; ``quick``: few blocks and pairs, one network."""
    found: list[dict[str, Any]] = []
    for name in list(NETS)[: 1 if quick else None]:
        print(f"exits/{name}: every way to run it ...", file=sys.stderr, flush=True)
        measured = fresh.call(f"{__name__}:served", {"name": name, "quick": quick})
        found += _realised(name, measured["executors"], quick)
        found += _waits(name, measured["latencies"])
        if exit_peer.available() and not quick:
            found += _against(name, fresh.call(f"{__name__}:against", {"name": name}))
    return found


def planted(name: str, quick: bool) -> Planted:
    """One of the networks."""
    return NETS[name](QUICK_DEPTH if quick else DEPTH, QUICK_BATCH if quick else BATCH)


def served(name: str, quick: bool) -> dict[str, Any]:
    """`executors` and `latencies` of one network."""
    return {"executors": executors(name, quick), "latencies": latencies(name, quick)}


def executors(name: str, quick: bool) -> dict[str, Any]:
    """For each way to run: pairs of seconds (with exits, full network), FLOPs of both, what was compiled."""
    subject, batch, pairs = (
        planted(name, quick),
        QUICK_BATCH if quick else BATCH,
        QUICK_PAIRS if quick else PAIRS,
    )
    inputs = subject.draw(batch, 3)
    host = HostExecutor(subject.net, inputs, capacity=batch)
    begin = time.perf_counter()
    host.warm_up().tune()
    warm = {"seconds": time.perf_counter() - begin, "programs": host.compilations}
    ways: dict[str, Callable[[Any], Executed]] = {
        f"host/{batch}": host,
        f"masked/{batch}": MaskedExecutor(subject.net),
        f"shared loop/{batch}": LaxExecutor(subject.net),
        f"compact/{batch}": CompactExecutor(subject.net, () if quick else (1, 4, 16)),
    }
    found = {how: _pairs(subject, run, inputs, pairs) for how, run in ways.items()}
    one = HostExecutor(subject.net, inputs, capacity=1).warm_up()
    found["host/1"] = _singles(subject, one, inputs, pairs)
    found["lax/1"] = _singles(subject, LaxExecutor(subject.net), inputs, pairs)
    found["stream"] = _stream(subject, batch, pairs)
    host.thresholds[:] = np.inf
    found["overhead"] = _pairs(subject, host, inputs, pairs)
    warm["after"] = host.compilations
    return {"ways": found, "warm_up": warm, "form": subject.form}


def _pairs(
    subject: Planted, run: Callable[[Any], Executed], inputs: np.ndarray, pairs: int
) -> dict[str, Any]:
    ledger = run(inputs).ledger
    found = timing.interleaved(lambda: run(inputs), lambda: subject.full(inputs), pairs)
    spent = {which: ledger.total(which) for which in ("needed", "executed")}
    return {"pairs": vars(found), **spent, "needed_peer": len(inputs) * subject.flops}


def _singles(
    subject: Planted, run: Callable[[Any], Executed], inputs: np.ndarray, pairs: int
) -> dict[str, Any]:
    """One input at a time, against the full network one at a time."""
    ledgers = [run(inputs[n : n + 1]).ledger for n in range(len(inputs))]
    each = lambda call: [call(inputs[n : n + 1]) for n in range(len(inputs))]
    found = timing.interleaved(lambda: each(run), lambda: each(subject.full), pairs)
    spent = {w: sum(ledger.total(w) for ledger in ledgers) for w in ("needed", "executed")}
    return {"pairs": vars(found), **spent, "needed_peer": len(inputs) * subject.flops}


class Saturated:
    """A stream that always has a backlog: a call serves ``count`` more examples.

    A batch a segment always waits besides, so that one of the queues has a full one: a stream without a bound on
    waiting runs nothing else.
    """

    def __init__(self, subject: Planted, stream: StreamExecutor, batch: int, count: int):
        self.stream, self.count = stream, count
        self._inputs = subject.draw(count, 3)
        self._debt = 0
        stream.submit(subject.draw(len(subject.net.segments) * batch, 4))
        self()

    def __call__(self) -> None:
        """Takes ``count`` in and gives ``count`` out."""
        self.stream.submit(self._inputs)
        self._debt += self.count
        while self._debt > 0:
            self._debt -= len(self.stream.step())


def _stream(subject: Planted, batch: int, pairs: int) -> dict[str, Any]:
    count = 2 * batch
    stream = StreamExecutor(subject.net, subject.draw(1, 0), bucket=batch).warm_up()
    ours, parts = Saturated(subject, stream, batch, count), np.split(subject.draw(count, 3), 2)
    before = stream.needed.copy(), stream.executed.copy()
    found = timing.interleaved(ours, lambda: [subject.full(part) for part in parts], pairs, WARM_UP)
    prices = np.asarray([part.cost.flops for part in subject.net.segments])
    # Over all calls, warm-up ones included: a window's own share varies by who is on the way.
    after, calls = (stream.needed, stream.executed), pairs + WARM_UP
    spent = [int(((b - a) * prices).sum()) // calls for a, b in zip(before, after, strict=True)]
    both = dict(zip(("needed", "executed"), spent, strict=True))
    return {"pairs": vars(found), **both, "needed_peer": count * subject.flops}


def _realised(name: str, found: dict[str, Any], quick: bool) -> list[dict[str, Any]]:
    rows = []
    for how, one in found["ways"].items():
        pairs = timing.Pairs(**one.pop("pairs"))
        ours, peer = pairs.seconds()
        words: dict[str, Any] = {"median_ours": ours, "median_peer": peer, **one}
        words |= {"peer": f"the network without exits, {found['form']}", "runs": len(pairs.ours)}
        if how == "overhead":
            rows.append(_overhead(name, pairs, found["warm_up"], words, quick))
            continue
        share = one["needed"] / one["needed_peer"]
        ratio, interval = timing.median_interval([share / r for r in pairs.ratios()])
        goal = None if quick else GOALS.get(how)
        rows.append(
            timing.row(
                f"exits/{name}/{how.replace(' ', '_')}",
                ratio,
                interval,
                reference=REALISED.format(how=how, net=name),
                goal=goal,
                relation="report" if goal is None else ">=",
                **words,
            )
        )
    return rows


def _overhead(
    name: str, pairs: timing.Pairs, warm: dict[str, Any], words: dict[str, Any], quick: bool
) -> dict[str, Any]:
    ratio, interval = timing.median_interval(pairs.ratios())
    told = {"warm_up_seconds": warm["seconds"], "programs": warm["programs"]}
    told["compiled_after_warm_up"] = warm["after"] - warm["programs"]
    return timing.row(
        f"exits/{name}/overhead",
        ratio,
        interval,
        reference=OVERHEAD.format(net=name),
        goal=None if quick else OVERHEAD_GOAL,
        relation="report" if quick else "<=",
        **words,
        **told,
    )


def against(name: str) -> dict[str, Any]:
    """Pairs of seconds (ours, PyTorch) for a batch, and for the same queues."""
    subject = planted(name, quick=False)
    inputs = subject.draw(BATCH, 3)
    host = HostExecutor(subject.net, inputs, capacity=BATCH).warm_up().tune()
    theirs = exit_peer.batches(name, subject, BATCH)
    mine, other = host(inputs), theirs(inputs)
    agree = float((mine.exits == other.exits).mean())
    found = {"batch": timing.interleaved(lambda: host(inputs), lambda: theirs(inputs), PAIRS)}
    whole = exit_peer.full(name, subject)
    found["without exits"] = timing.interleaved(
        lambda: subject.full(inputs), lambda: whole(inputs), PAIRS
    )
    streams = (
        StreamExecutor(subject.net, inputs, bucket=BATCH),
        exit_peer.stream(name, subject, BATCH),
    )
    streams[0].warm_up()
    ours, peer = (Saturated(subject, stream, BATCH, 2 * BATCH) for stream in streams)
    found["stream"] = timing.interleaved(ours, peer, PAIRS)
    return {**{how: vars(pairs) for how, pairs in found.items()}, "same_exit": agree}


def _against(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    rows, agree = [], found.pop("same_exit")
    for how, raw in found.items():
        pairs = timing.Pairs(**raw)
        ratio, interval = timing.median_interval([1 / r for r in pairs.ratios()])
        ours, peer = pairs.seconds()
        plain = how == "without exits"  # the compilers' business, not the runtime's
        rows.append(
            timing.row(
                f"exits/{name}/torch/{how.replace(' ', '_')}",
                ratio,
                interval,
                reference=PLAIN.format(net=name) if plain else AGAINST.format(how=how, net=name),
                runs=len(pairs.ours),
                goal=None if plain else TORCH_GOAL,
                relation="report" if plain else ">=",
                peer="PyTorch",
                median_ours=ours,
                median_peer=peer,
                same_exit=agree,
            )
        )
    return rows


def latencies(name: str, quick: bool) -> dict[str, Any]:
    """Seconds from arrival to output of every example, ours and the fixed server's, by load."""
    subject, batch = planted(name, quick), QUICK_BATCH if quick else BATCH
    arrivals = 6 if quick else ARRIVALS
    stream = StreamExecutor(subject.net, subject.draw(1, 0), bucket=batch, max_wait=MAX_WAIT)
    saturated = Saturated(subject, stream.warm_up(), batch, 4 * batch)
    begin = time.perf_counter()
    saturated()
    rate = 4 * batch / (time.perf_counter() - begin)
    stream.drain()
    fixed = exit_nets.fixed_server(subject, batch)
    inputs = subject.draw(arrivals, 5)
    found = {}
    for load in LOADS[: 1 if quick else None]:
        gaps = np.random.default_rng(6).exponential(1 / (load * rate), arrivals)
        when = np.cumsum(gaps)
        found[str(load)] = {
            "ours": _served(stream, inputs, when),
            "peer": _served_fixed(fixed, inputs, when, batch),
        }
    return {"rate": rate, "loads": found}


def _served(stream: StreamExecutor, inputs: np.ndarray, when: np.ndarray) -> list[float]:
    """Waits of examples that arrive when told, in the order they leave."""
    begin, taken, waits = time.perf_counter(), 0, []
    arrived: dict[int, float] = {}
    while len(waits) < len(inputs):
        now = time.perf_counter() - begin
        due = int(np.searchsorted(when, now, side="right"))
        if due > taken:
            tickets = stream.submit(inputs[taken:due])
            arrived |= dict(zip(tickets, when[taken:due].tolist(), strict=True))
            taken = due
        done = stream.step(flush=True)  # a machine with nothing to do takes what there is
        now = time.perf_counter() - begin
        waits += [now - arrived[one.ticket] for one in done]
        if not done and not stream.pending and taken < len(inputs):
            time.sleep(max(0.0, when[taken] - now))
    return waits


def _served_fixed(
    call: Callable[[Any], Any], inputs: np.ndarray, when: np.ndarray, batch: int
) -> list[float]:
    """The same for a server that runs all that wait, at most a batch, through one network."""
    begin, taken, waits = time.perf_counter(), 0, []
    while taken < len(inputs):
        now = time.perf_counter() - begin
        due = min(int(np.searchsorted(when, now, side="right")), taken + batch)
        if due == taken:
            time.sleep(max(0.0, when[taken] - now))
            continue
        call(inputs[taken:due])
        now = time.perf_counter() - begin
        waits += [now - t for t in when[taken:due].tolist()]
        taken = due
    return waits


def _waits(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for load, sides in found["loads"].items():
        told: dict[str, Any] = {
            f"{side}_p{q}": float(np.percentile(waits, q))
            for side, waits in sides.items()
            for q in (50, 95, 99)
        }
        rows.append(
            timing.row(
                f"exits/{name}/latency/{load}",
                told["ours_p95"] / told["peer_p95"],
                None,
                reference=WAITS.format(load=load),
                runs=len(sides["ours"]),
                peer="fixed depth",
                median_ours=told["ours_p50"],
                median_peer=told["peer_p50"],
                arrivals_a_second=float(load) * found["rate"],
                **told,
            )
        )
    return rows
