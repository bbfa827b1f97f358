"""A decoder in plain numbers: what a config.json says, what a `DecoderLM` is, and the bridge between both."""

import dataclasses
import functools
from typing import Any, Literal

from dyncomp.attention import Attention, RopeScaling
from dyncomp.core.dtypes import DTypes, FloatName
from dyncomp.core.errors import DyncompError
from dyncomp.experts import MLP, MoE, SwiGLU
from dyncomp.models import Block, DecoderLM, Group
from dyncomp.models.group import Execution
from dyncomp.models.norm import NormKind
from dyncomp.routers import TopK

MAX_LAYERS = 1000
LONGEST_PERIOD = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One block.

    Attributes:
      heads, kv_heads, head_dim: of attention.
      theta, scaling: RoPE; theta None for none.
      window: slots attention looks back; None for all.
      qkv_bias, out_bias, qk_norm: see `Attention`.
      hidden: width of the FFN, or of each expert.
      activation: "swiglu", or of an MLP with biases: "gelu", "relu" or "silu".
      experts: e; 0 for a dense FFN.
      k, renormalize: see `routers.TopK`.
      shared: width of a gated shared expert; 0 for none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    theta: float | None = 10_000.0
    scaling: RopeScaling | None = None
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    hidden: int
    activation: Literal["swiglu", "gelu", "relu", "silu"] = "swiglu"
    experts: int = 0
    k: int = 0
    renormalize: bool = True
    shared: int = 0

    def mixer(self, eps: float) -> functools.partial:
        """Factory of the mixer."""
        split = self.qkv_bias != self.out_bias
        return functools.partial(
            Attention,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope_theta=self.theta,
            rope_scaling=self.scaling,
            window=self.window,
            bias=self.out_bias,
            qkv_bias=self.qkv_bias if split else None,
            qk_norm=self.qk_norm,
            eps=eps,
        )

    def ffn(self) -> functools.partial:
        """Factory of the ffn unit."""
        if self.activation != "swiglu":
            return functools.partial(MLP, hidden=self.hidden, activation=self.activation)
        if not self.experts:
            return functools.partial(SwiGLU, hidden=self.hidden)
        shared = functools.partial(SwiGLU, hidden=self.shared) if self.shared else None
        return functools.partial(
            MoE,
            router=functools.partial(TopK, k=self.k, renormalize=self.renormalize),
            num_experts=self.experts,
            hidden=self.hidden,
            shared=shared,
            shared_gate=bool(self.shared),
        )

    @classmethod
    def of(cls, mixer: Any, ffn: Any, d_model: int) -> "Layer":
        """The numbers of two instances (made without parent)."""
        heads, kv_heads, head_dim = mixer.sizes(d_model)
        numbers: dict[str, Any] = {"hidden": ffn.hidden}
        if isinstance(ffn, MLP):
            numbers["activation"] = ffn.activation
        if isinstance(ffn, MoE):
            router = ffn.router(num_experts=ffn.num_experts, parent=None)
            shared = ffn.shared(parent=None).hidden if ffn.shared else 0
            numbers |= {"experts": ffn.num_experts, "k": router.k, "shared": shared}
            numbers["renormalize"] = router.renormalize
        return cls(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            theta=mixer.rope_theta,
            scaling=mixer.rope_scaling,
            window=mixer.window,
            qkv_bias=mixer.bias if mixer.qkv_bias is None else mixer.qkv_bias,
            out_bias=mixer.bias,
            qk_norm=mixer.qk_norm,
            **numbers,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """A whole decoder; fields as in `DecoderLM`, its blocks in order."""

    vocab_size: int
    d_model: int
    layers: tuple[Layer, ...]
    tie_embeddings: bool = False
    norm: NormKind = "rms"
    eps: float = 1e-6
    learned_positions: int | None = None
    max_length: int | None = None

    def groups(self) -> list[tuple[tuple[Layer, ...], int]]:
        """Periods of layers and how often each repeats."""
        total = len(self.layers)
        for period in range(1, min(LONGEST_PERIOD, total) + 1):
            head = self.layers[:period]
            if total % period == 0 and head * (total // period) == self.layers:
                return [(head, total // period)]
        runs: list[tuple[tuple[Layer, ...], int]] = []
        for layer in self.layers:
            if runs and runs[-1][0] == (layer,):
                runs[-1] = ((layer,), runs[-1][1] + 1)
            else:
                runs.append(((layer,), 1))
        return runs

    def block(self, layer: Layer) -> functools.partial:
        """Factory of one block."""
        return functools.partial(
            Block, mixer=layer.mixer(self.eps), ffn=layer.ffn(), norm=self.norm, eps=self.eps
        )

    def model(self, layers: Execution = "unroll", dtype: FloatName = "float32") -> DecoderLM:
        """The backbone."""
        groups = [Group([self.block(b) for b in blocks], n) for blocks, n in self.groups()]
        return DecoderLM(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            groups=groups,
            layers=layers,
            tie_embeddings=self.tie_embeddings,
            norm=self.norm,
            eps=self.eps,
            learned_positions=self.learned_positions,
            max_length=self.max_length,
            dtypes=DTypes(param=dtype, compute=dtype),
        )

    @classmethod
    def of(cls, model: DecoderLM) -> "Spec":
        """The numbers of a backbone.

        Raises:
          DyncompError: it holds parts that no published architecture has.
        """
        blocks = [
            make(parent=None) for g in model.groups for _ in range(g.repeat) for make in g.blocks
        ]
        try:
            layers = [
                Layer.of(block.mixer(parent=None), block.ffn(parent=None), model.d_model)
                for block in blocks
            ]
        except (AttributeError, TypeError) as error:
            raise DyncompError(f"cannot export this model: a block is special ({error})") from error
        names = [f.name for f in dataclasses.fields(cls) if f.name != "layers"]
        numbers: dict[str, Any] = {name: getattr(model, name) for name in names}
        spec = cls(**numbers | {"layers": tuple(layers)})
        for layer, block in zip(layers, blocks, strict=True):
            _same(spec.block(layer)(parent=None), block, "block")
        return spec


FREE = {
    "parent",
    "name",
    "dtypes",
    "cache",
    "dispatch",
    "exchange",
    "head_dim",
    "kv_heads",
    "qkv_bias",
}
"""Fields that change no number of the dense result, or that `Layer.of` has resolved."""


def _same(plain: Any, found: Any, where: str) -> None:
    """Refuses a module that is not what its numbers alone would build: an export would drop the difference."""
    if isinstance(plain, functools.partial) and callable(found):
        extra = {"num_experts": 8} if where.endswith(".router") else {}
        plain, found = (make(parent=None, **extra) for make in (plain, found))
    if isinstance(plain, type) and plain is found:
        return
    if type(plain) is not type(found):
        raise DyncompError(
            f"cannot export this model: {where} is {type(found).__name__}; published models have {type(plain).__name__}"
        )
    if not dataclasses.is_dataclass(plain) or isinstance(plain, RopeScaling):
        if plain != found:
            raise DyncompError(f"cannot export this model: {where}={found!r}, expected {plain!r}")
        return
    unused = {"eps"} if isinstance(plain, Attention) and not plain.qk_norm else set()
    for field in dataclasses.fields(plain):
        if field.name not in FREE | unused:
            _same(getattr(plain, field.name), getattr(found, field.name), f"{where}.{field.name}")
