"""``dyncomp train-exits``: exit maps for a pretrained language model, and what they are worth on held-out text."""

import argparse
import sys
import time
from typing import Any

from dyncomp.cli.output import command, json_flag, print_json, table
from dyncomp.core.errors import DyncompError

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
PER_DOCUMENT = 8
"""Windows of one document at most, so that long files do not outweigh the others."""


def add(commands: Any) -> None:
    """Adds the command."""
    about = (
        "Train maps that let middle blocks of a frozen language model speak through its last head."
    )
    example = (
        "dyncomp train-exits HuggingFaceTB/SmolLM2-135M-Instruct exits.safetensors --exits 12,18,24"
    )
    parser = command(commands, "train-exits", _main, about, example)
    parser.add_argument("model", help="as for dyncomp generate")
    parser.add_argument("out", help="safetensors file to write; dyncomp generate --exits reads it")
    parser.add_argument("--exits", required=True, help="blocks that have run, such as 12,18,24")
    parser.add_argument(
        "--text", help="a text file or a folder of .py, .txt and .md; default: Python's library"
    )
    parser.add_argument("--tokens", type=int, default=65536, help="to train on (default 65536)")
    parser.add_argument("--held-out", type=int, default=16384, help="to measure on (default 16384)")
    parser.add_argument("--window", type=int, default=256, help="tokens read at once (default 256)")
    parser.add_argument("--epochs", type=int, default=1, help="0 keeps the least-squares start")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    json_flag(parser)


def _main(args: argparse.Namespace) -> None:
    from dyncomp import decoding, pretrained
    from dyncomp.decoding.net import Net, separate

    exits = parse_exits(args.exits)
    loaded = pretrained.load(args.model)
    if loaded.tokenizer is None:
        raise DyncompError(
            f"{args.model} has no tokenizer; put its tokenizer.json beside the weights"
        )
    net = Net(*separate(loaded.model, loaded.variables))
    train, held_out = _windows(args, loaded.tokenizer)
    begin = time.perf_counter()
    with _Progress() as progress:
        found = decoding.read_states(net, exits, train, done=progress.of("read", len(train) // 4))
        maps = decoding.least_squares(found)
        if args.epochs:
            steps = args.epochs * (len(found.targets) // 512)
            maps = decoding.distill(
                net,
                maps,
                found,
                epochs=args.epochs,
                learning_rate=args.learning_rate,
                seed=args.seed,
                done=progress.of("train", steps),
            )
    seconds = time.perf_counter() - begin
    maps.save(args.out)
    del found
    found = decoding.read_states(net, exits, held_out)
    scores = decoding.score_exits(net, found, maps)
    said = {
        "seconds": round(seconds, 1),
        "held_out": len(found.targets),
        "exits": _exits(scores, decoding.score_exits(net, found)),
        "thresholds": _thresholds(scores),
    }
    print_json(said) if args.json else _show(args, said)


def parse_exits(text: str) -> tuple[int, ...]:
    """``"12,18"`` as numbers.

    Raises:
      DyncompError: something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise DyncompError(
            f"--exits {text}: give numbers of blocks with commas, such as 12,18"
        ) from error


def _windows(args: argparse.Namespace, tokenizer: Any) -> list[Any]:
    """Windows of the training and of the test documents."""
    from dyncomp.tasks import corpus

    documents = (
        corpus.text_files(args.text, (".py", ".txt", ".md"))
        if args.text
        else corpus.standard_library()
    )
    parts = corpus.split_documents(documents)
    sizes = {"train": args.tokens, "test": args.held_out}
    return [_cut(args, tokenizer, parts[name], wanted) for name, wanted in sizes.items()]


def _cut(args: argparse.Namespace, tokenizer: Any, documents: Any, wanted: int) -> Any:
    """About ``wanted`` tokens of shuffled documents, in windows [m t] that do not cross documents."""
    import numpy as np

    rng, windows, enough = np.random.default_rng(args.seed), [], -(-wanted // args.window)
    for n in rng.permutation(len(documents)):
        ids = tokenizer.encode(documents[n][1].decode("utf-8", errors="replace"))
        whole = len(ids) // args.window
        rows = np.asarray(ids[: whole * args.window], np.int32).reshape(whole, args.window)
        windows.extend(rows[np.sort(rng.permutation(whole)[:PER_DOCUMENT])])
        if len(windows) >= enough:
            break
    if not windows:
        raise DyncompError(
            f"no document has {args.window} tokens; give more --text or a smaller --window"
        )
    return np.stack(windows[:enough])


def _exits(trained: Any, raw: Any) -> list[dict[str, Any]]:
    """Figures of each exit, full depth last."""
    both = zip(trained.agreement(), raw.agreement(), strict=True)
    return [
        {
            "blocks": depth,
            "nats": float(trained.nats[n].mean()),
            "agreement": float(own),
            "raw_nats": float(raw.nats[n].mean()),
            "raw_agreement": float(without),
        }
        for n, (depth, (own, without)) in enumerate(zip(trained.depths, both, strict=True))
    ]


def _thresholds(scores: Any) -> list[dict[str, Any]]:
    """Figures of each threshold, with all exits."""
    found = [(t, scores.leaving(t)) for t in THRESHOLDS]
    return [
        {"threshold": t, "blocks": f.blocks, "heads": f.heads, "agreement": f.agreement,
         "shares": f.shares.tolist()}
        for t, f in found
    ]  # fmt: skip


def _show(args: argparse.Namespace, said: dict[str, Any]) -> None:
    heads = ("blocks", "nats", "agreement", "raw nats", "raw agreement")
    title = f"{args.out}: trained in {said['seconds']} s; {said['held_out']} tokens of held-out documents"
    note = "Nats a token of the text; agreement: the likeliest token is full depth's. Raw: without a map."
    table(title, heads, [tuple(row.values()) for row in said["exits"]], note)
    heads = ("threshold", "blocks", "heads read", "agreement")
    rows = [tuple(row.values())[:4] for row in said["thresholds"]]
    note = (
        "Means a token, leaving at the first exit whose highest probability reaches the threshold."
    )
    table("Confident exits, exact caches", heads, rows, note)


class _Progress:
    """Bars on standard error."""

    def __enter__(self) -> "_Progress":
        from rich.console import Console
        from rich.progress import Progress

        self._bars = Progress(console=Console(file=sys.stderr))
        self._bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bars.stop()

    def of(self, name: str, total: int) -> Any:
        """A bar; what is returned moves it by one."""
        bar = self._bars.add_task(name, total=total)

        def done(losses: Any = None) -> None:
            told = "" if losses is None else " ".join(f"{loss:.2f}" for loss in losses)
            self._bars.update(bar, advance=1, description=f"{name} {told}")

        return done
