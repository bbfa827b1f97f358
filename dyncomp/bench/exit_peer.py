"""The networks of `exit_nets` in PyTorch, same weights, for the same executors: rows that go on are taken by an index.

Batches are compacted to exactly those that stay, as PyTorch does without compiling; streams get the same queues.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dyncomp.bench.exit_nets import HEADS, PATCH, Planted
from dyncomp.runtime import HostExecutor, StreamExecutor
from dyncomp.runtime.programs import Chunk

EPS, THETA = 1e-6, 10_000.0


def available() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def batches(name: str, subject: Planted, batch: int) -> HostExecutor:
    """Runs a batch; after every block the rows that stay are one launch of just their number."""
    made = HostExecutor(
        subject.net, subject.draw(1, 0), capacity=batch, buckets=tuple(range(1, batch + 1))
    )
    made._programs = TorchPrograms(name, subject, made._programs)  # type: ignore[assignment]
    return made


def stream(name: str, subject: Planted, batch: int) -> StreamExecutor:
    """Serves a stream from the same queues."""
    made = StreamExecutor(subject.net, subject.draw(1, 0), bucket=batch)
    made._programs = TorchPrograms(name, subject, made._programs)  # type: ignore[assignment]
    return made


def full(name: str, subject: Planted) -> Callable[[np.ndarray], np.ndarray]:
    """All blocks and the last head: batch -> logits."""
    import torch  # pyrefly: ignore

    net, last = _net(name, subject), len(subject.net.segments) - 1

    def call(inputs: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            x = net.embed(torch.from_numpy(inputs))
            for index in range(last + 1):
                x = net.block(index, x)
            return net.classify(last, x).numpy()

    return call


def _net(name: str, subject: Planted) -> Any:
    """The network on as many threads as this process may use cores."""
    import torch  # pyrefly: ignore

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return {"vit": Images, "text": Text}[name](torch, subject.params)


class TorchPrograms:
    """What `runtime.programs.Programs` does, eagerly in PyTorch on one buffer of slots."""

    def __init__(self, name: str, subject: Planted, ours: Any):
        import torch  # pyrefly: ignore

        self.graph, self.buckets, self.flat = ours.graph, ours.buckets, ours.flat
        self.thresholds, self.compilations, self.split = ours.thresholds, 0, ours.split
        self.torch = torch
        self.net = _net(name, subject)
        (slot,) = [leaf for leaf in ours.flat.carry if len(leaf.shape) == 2]
        self._buffer = torch.zeros((ours.capacity, *slot.shape))

    def launch(self, index: int, size: int, slots: np.ndarray, inputs: Any = None) -> Chunk:
        """Segment ``index`` on just ``slots``."""
        torch, rows = self.torch, self.torch.from_numpy(np.asarray(slots, np.int64))
        with torch.inference_mode():
            x = self.net.embed(torch.from_numpy(inputs)) if index == 0 else self._buffer[rows]
            x = self.net.block(index, x)
            logits = self.net.classify(index, x)
            score = torch.softmax(logits, -1).amax(-1)
            if not self.graph.ends(index):
                self._buffer[rows] = x
            leave = score >= float(self.thresholds[index])
            found = [part.numpy() for part in (logits, leave, score)]
        return Chunk(index, len(slots), slots, np.arange(len(slots)), *found)


class _Net:
    """Blocks of attention and a feed-forward unit, norms before each."""

    def __init__(self, torch: Any, blocks: Any):
        self.torch, self.F = torch, torch.nn.functional
        self.blocks = [self._loaded(one) for one in blocks]

    def _loaded(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: self.torch.from_numpy(np.array(leaf)), tree)

    def block(self, index: int, x: Any) -> Any:
        own = self.blocks[index]
        x = x + self._attend(own["mixer"], self._norm(own["mixer_norm"], x))
        return x + self._feed(own["ffn"], self._norm(own["ffn_norm"], x))

    def _norm(self, own: Any, x: Any) -> Any:
        width = x.shape[-1:]
        if "bias" in own:
            return self.F.layer_norm(x, width, own["scale"], own["bias"], EPS)
        return self.F.rms_norm(x, width, own["scale"], EPS)

    def _attend(self, own: Any, x: Any) -> Any:
        b, t, d = x.shape

        def heads(name: str) -> Any:
            bias = own.get(f"{name}_bias")
            flat = self.F.linear(
                x, own[name].reshape(d, d).T, None if bias is None else bias.reshape(d)
            )
            return flat.view(b, t, HEADS, d // HEADS).transpose(1, 2)

        q, k, v = (heads(name) for name in "qkv")
        mixed = self.F.scaled_dot_product_attention(self._turned(q), self._turned(k), v)
        mixed = mixed.transpose(1, 2).reshape(b, t, d)
        return self.F.linear(mixed, own["out"].reshape(d, d).T, own.get("out_bias"))

    def _turned(self, x: Any) -> Any:
        return x

    def _feed(self, own: Any, x: Any) -> Any:
        if "gate" in own:
            return (self.F.silu(x @ own["gate"]) * (x @ own["up"])) @ own["down"]
        h = self.F.gelu(self.F.linear(x, own["up"].T, own["up_bias"]), approximate="tanh")
        return self.F.linear(h, own["down"].T, own["down_bias"])


class Images(_Net):
    """The vision transformer."""

    def __init__(self, torch: Any, params: Any):
        net = params["net"]
        super().__init__(torch, _ordered(net["group_0"]))
        self.patches, self.norm = self._loaded(net["patches"]), self._loaded(net["final_norm"])
        heads, last = self._loaded(params["bank"]["heads"]), self._loaded(net["head"])
        pairs = zip(heads["logits_kernel"], heads["logits_bias"], strict=True)
        self.heads = [*pairs, (last["kernel"], last["bias"])]

    def embed(self, images: Any) -> Any:
        """Patches, class token, positions."""
        b, h, w, c = images.shape
        grid = images.view(b, h // PATCH, PATCH, w // PATCH, PATCH, c).transpose(2, 3)
        x = grid.reshape(b, -1, PATCH * PATCH * c) @ self.patches["kernel"] + self.patches["bias"]
        token = self.patches["cls"].expand(b, 1, -1)
        return self.torch.cat([token, x], 1) + self.patches["positions"]

    def classify(self, index: int, x: Any) -> Any:
        """Logits of one exit."""
        kernel, bias = self.heads[index]
        return self._norm(self.norm, x[:, 0]) @ kernel + bias


class Text(_Net):
    """The text encoder."""

    def __init__(self, torch: Any, params: Any):
        super().__init__(torch, _ordered(params["net"]["group_0"]))
        self.table, self.heads = self._loaded(params["net"]["embed"]), self._loaded(params["heads"])
        self._angles: Any = None

    def embed(self, tokens: Any) -> Any:
        """Rows of the table."""
        return self.F.embedding(tokens.long(), self.table)

    def classify(self, index: int, x: Any) -> Any:
        """Logits of one exit."""
        return x.mean(1) @ self.heads[index]

    def _turned(self, x: Any) -> Any:
        t, p = x.shape[-2:]
        if self._angles is None:
            rates = THETA ** (-self.torch.arange(0, p, 2) / p)
            angles = self.torch.arange(t)[:, None] * rates
            self._angles = angles.cos(), angles.sin()
        cos, sin = self._angles
        first, second = x.chunk(2, -1)
        return self.torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _ordered(group: Any) -> list[Any]:
    """The blocks of an unrolled group of one-block periods."""
    names = sorted(group, key=lambda n: int(n.rsplit("_", 1)[1]))
    return [group[name]["block_0"] for name in names]
