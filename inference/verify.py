"""Checks a run of a DeepSeek-V3, V2 or Kimi-K2 checkpoint op by op, and names the first op that diverges.

  python verify.py --ckpt-path CKPT --run DIR                       what another program wrote (docs/verifying.md)
  python verify.py --ckpt-path CKPT --run transformers              transformers' classes
  torchrun --nproc-per-node 2 verify.py --ckpt-path CKPT --mtp 1    this engine, as the flags say
  python verify.py --ckpt-path CKPT --sample                        formats on some layers, in bounded memory

Exit status: 0 no divergence; 1 a divergence, or a rank was lost; 2 wrong use, or a checkpoint that cannot be used.
"""

if __name__ == "__main__":
    from cli.interrupts import end_process_on_interrupt

    end_process_on_interrupt()

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cli import main as cli
from cli.flags import Parser, add_checkpoint_flags, add_engine_flags, positive
from core.errors import UserError

if TYPE_CHECKING:
    from parallel.group import Group
    from verification.trace import Trace

DEFAULT_TOKENS, DEFAULT_NEW_TOKENS = 48, 8


def parse(arguments: list[str]) -> argparse.Namespace:
    """Raises UserError for wrong use."""
    parser = Parser(__doc__)
    add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--run", default="engine", metavar="SIDE",
        help="what is checked: engine (default), transformers, or a directory")  # fmt: skip
    add("--against", metavar="SIDE",
        help="what errors accumulate against: exact (default), none, transformers, or a directory")  # fmt: skip
    add("--prompt", metavar="TEXT", help="the text that engine and transformers are given")
    add("--tokens", type=positive, metavar="N", help=f"or so many token ids (default: {DEFAULT_TOKENS})")
    add("--max-new-tokens", type=positive, metavar="N",
        help=f"tokens that the engine adds (default: {DEFAULT_NEW_TOKENS})")  # fmt: skip
    add("--save", metavar="DIR", help="keep the run's trace here")
    add("--json", metavar="FILE", help="write the report as JSON")
    add("--html", metavar="FILE", help="write the report as a page, with a picture of the errors by layer")
    add("--sample", action="store_true", help="compare W8A8, W8A16 and BF16 with exact weights on some layers")
    add("--layers", metavar="LAYERS", help="of --sample, such as 0,3,60 (default: first, first of experts, last)")
    add("--states", metavar="DIR", help="of --sample, a trace whose hidden states layers take (default: embeddings)")
    add_engine_flags(parser)
    options = parser.parse_args(arguments)
    if options.prompt is not None and options.tokens is not None:
        parser.error("give either --prompt or --tokens")
    for name in ("layers", "states"):
        if getattr(options, name) is not None and not options.sample:
            parser.error(f"--{name} goes with --sample")
    if options.sample and (options.run != "engine" or options.against is not None):
        parser.error("--sample runs by itself, without --run and --against")
    if options.run != "engine" and options.max_new_tokens is not None:
        parser.error("--max-new-tokens goes with --run engine")
    return options


def run(options: argparse.Namespace, tp: "Group") -> int:
    """Runs, judges on rank 0, and prints; raises UserError on all ranks alike."""
    if options.sample:
        return sample(options) if tp.rank == 0 else 0
    if options.run == "engine":
        with tempfile.TemporaryDirectory() as folder:
            return run_engine(options, tp, options.save or str(Path(folder, "trace")))
    return judge(options) if tp.rank == 0 else 0


def run_engine(options: argparse.Namespace, tp: "Group", folder: str) -> int:
    """This engine's run: recorded on all ranks, judged on rank 0."""
    from verification.sides import prompt_ids, record_engine

    if tp.size > 1:  # all ranks write into rank 0's
        folder = bytes(tp.broadcast_ints(list(folder.encode()))).decode()
    needs = {"eager": True, "prefix_reuse": False}
    engine, ids = cli.load(options, tp, lambda: prompt_ids(options.ckpt_path, options.prompt, count(options)), needs,
                           chat=False)  # fmt: skip
    record_engine(engine, folder, ids, options.max_new_tokens or DEFAULT_NEW_TOKENS)
    if tp.rank > 0:
        return 0
    del engine
    return judge(options, folder)


def count(options: argparse.Namespace) -> int:
    return options.tokens or DEFAULT_TOKENS


def judge(options: argparse.Namespace, folder: str | None = None) -> int:
    """Judges a run, the engine's in `folder` or another side's; prints, writes the files asked for, and returns the
    exit status. Raises UserError."""
    from verification.check import check
    from verification.sides import open_side
    from verification.trace import write_trace
    from verification.weights import Weights

    weights = Weights(options.ckpt_path, options.config)
    what = "this engine" if folder else options.run

    def side(name: str, like: "Trace | None" = None) -> "Trace":
        return open_side(name, weights, options.prompt, count(options), like)

    against = options.against or "exact"
    is_folder = against not in ("none", "exact", "transformers")
    given = side(against) if is_folder else None  # whose tokens transformers computes too
    trace = side(folder or options.run, given)
    if options.save and not folder:
        write_trace(trace, options.save)
    other = None if against == "none" else given or side(against, trace)
    report = check(trace, weights, other, what=what, against="" if other is None else against)
    from verification import html
    from verification.report import dumps, text

    print(text(report), flush=True)
    if options.json:
        write(options.json, dumps(report))
    if options.html:
        write(options.html, html.page(report))
    return 1 if report.diverges else 0


def sample(options: argparse.Namespace) -> int:
    """Compares formats on some layers. Raises UserError."""
    from verification.sample import sample_layers, table

    rows = sample_layers(options.ckpt_path, options.config, options.layers, count(options), options.states)
    print(table(rows), flush=True)
    if options.json:
        write(options.json, json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    return 0


def write(path: str, text: str) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror or e}") from None


def main() -> int:
    return cli.run_on_ranks(parse, run)


if __name__ == "__main__":
    sys.exit(main())
