"""Answers prompts from a terminal or a file with a DeepSeek-V3, V2 or Kimi-K2 checkpoint.

  python generate.py --ckpt-path CKPT --interactive
  torchrun --nproc-per-node 8 generate.py --ckpt-path CKPT --input-file prompts.txt --output-file answers.jsonl

Exit status: 0; 1 some request failed, or a rank was lost; 2 wrong use, or a checkpoint that cannot be used.
"""

if __name__ == "__main__":
    from cli.interrupts import end_process_on_interrupt

    end_process_on_interrupt()

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from cli import main as cli
from cli.flags import Parser, add_checkpoint_flags, add_engine_flags, positive_number
from core.errors import UserError
from core.sampling_params import SamplingParams, params_from_generation_config

if TYPE_CHECKING:  # torch takes seconds to import: a mistyped flag is answered without it
    from cli.batch_files import BatchItem
    from engine.engine import Engine
    from parallel.group import Group
    from verification.recording import Selection

DEFAULT = SamplingParams  # a field's default is an attribute of the class
TRACE_FLAGS = ("trace_points", "trace_positions", "trace_mib")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Raises UserError for wrong use."""
    parser = Parser(__doc__)
    add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--interactive", action="store_true", help="a conversation in the terminal")
    add("--input-file", metavar="FILE", help="one prompt a line, or .jsonl requests in the OpenAI batch format")
    add("--output-file", metavar="FILE", help="also write the answers here, one JSON object a line")
    add("--max-new-tokens", type=int, metavar="N", help=f"most tokens of an answer (default: {DEFAULT.max_new_tokens})")
    add("--temperature", type=float, metavar="T",
        help=f"0 is greedy (default: generation_config.json's, else {DEFAULT.temperature})")  # fmt: skip
    add("--top-p", type=float, metavar="P", help="nucleus sampling (default: generation_config.json's, else 1)")
    add("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (default: all)")
    add("--min-p", type=float, metavar="P", help="drop tokens less likely than P times the likeliest")
    add("--repetition-penalty", type=float, metavar="X", help="divides logits of tokens already there")
    add("--presence-penalty", type=float, metavar="X", help="off the logits of tokens already answered")
    add("--frequency-penalty", type=float, metavar="X", help="the same, for each time they were")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be given several times")
    add("--seed", type=int, metavar="N", help=f"of the random numbers in sampling (default: {DEFAULT.seed})")
    add("--system", metavar="TEXT", help="a system message before each conversation")
    add("--no-thinking", action="store_true", help="for chat templates that can leave thinking out (DeepSeek-V3.1)")
    add("--raw", action="store_true", help="no chat template: complete the text (base models)")
    add("--stats", action="store_true", help="say at the end what the cache and the drafts were worth")
    add("--trace", metavar="DIR", help="write what the model computes at named points here (docs/verifying.md)")
    add("--trace-points", metavar="NAMES", help="those alone, such as '*.ffn.ids,logits' (default: all)")
    add("--trace-positions", metavar="WHICH", help="all, last (the prompt's) or like 0-7,12,-1 (default: all)")
    add("--trace-mib", type=positive_number("MiB"), metavar="MIB", help="memory a trace may take (default: 1024)")
    add_engine_flags(parser)
    options = parser.parse_args(arguments)
    if options.interactive == (options.input_file is not None):
        parser.error("give either --interactive or --input-file")
    if options.interactive and sys.platform == "win32":
        parser.error("--interactive takes a Unix terminal; --input-file does without")
    if options.output_file is not None and options.interactive:
        parser.error("--output-file goes with --input-file")
    for name in TRACE_FLAGS:
        if options.trace is None and getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} goes with --trace")
    if options.raw and options.system is not None:
        parser.error("--system needs the chat template that --raw leaves out")
    if options.raw and options.no_thinking:
        parser.error("--no-thinking needs the chat template that --raw leaves out")
    return options


def default_params(options: argparse.Namespace) -> SamplingParams:
    """From the flags, else the checkpoint's generation_config.json, else 0.2 and the rest off. Raises UserError."""
    return params_from_generation_config(
        Path(options.ckpt_path),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        seed=options.seed,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        stop=tuple(options.stop),
    )


def run(options: argparse.Namespace, tp: "Group") -> int:
    """Loads and answers; returns the exit status, the same on every rank. Raises UserError on all ranks alike."""
    from cli.batch_files import check_output, read_items

    def prepare() -> tuple[SamplingParams, list["BatchItem"]]:
        params = default_params(options)
        items = [] if options.interactive else read_items(options, params)
        if options.output_file is not None:
            check_output(options.output_file, options.input_file)
        if options.trace is not None:
            from verification.trace import require_new_folder

            trace_selection(options)
            require_new_folder(Path(options.trace))
        return params, items

    thinking = False if options.no_thinking else None
    # a trace needs forwards that are not replayed, and every prompt token run
    needs = {} if options.trace is None else {"eager": True, "prefix_reuse": False}
    engine, prepared = cli.load(options, tp, prepare, needs, chat=not options.raw, thinking=thinking)
    with traced(engine, options):
        if prepared is None:
            return cli.follow(engine)
        return answer(engine, options, *prepared, thinking)


def traced(engine: "Engine", options: argparse.Namespace) -> AbstractContextManager[object]:
    """Within it the engine writes a trace, if the flags ask for one. Raises UserError on all ranks alike."""
    if options.trace is None:
        return nullcontext()
    from verification.engine_trace import EngineTrace

    return EngineTrace(engine, options.trace, trace_selection(options))


def trace_selection(options: argparse.Namespace) -> "Selection":
    """Raises UserError."""
    from verification.recording import Selection

    given = {name.removeprefix("trace_"): getattr(options, name) for name in TRACE_FLAGS}
    if given["points"] is not None:
        given["points"] = tuple(given["points"].split(","))
    return Selection(**{name: value for name, value in given.items() if value is not None})


def answer(
    engine: "Engine",
    options: argparse.Namespace,
    params: SamplingParams,
    items: list["BatchItem"],
    thinking: bool | None,
) -> int:
    """Rank 0: answers, ends the engine, and returns the exit status."""
    from cli.batch_files import answer_file

    try:
        if options.interactive:
            from cli.chat_loop import chat_loop

            status = chat_loop(engine, params, options)
        else:
            status = answer_file(engine, items, options.output_file, thinking)
        if options.stats:
            print(engine.stats, file=sys.stderr, flush=True)
    except BrokenPipeError:  # whoever read our output has gone
        cli.discard_output()
        status = 1
    except UserError as e:  # an output file that cannot be written further
        cli.complain(str(e))
        status = 1
    return cli.finish(engine, status)


def main() -> int:
    return cli.run_on_ranks(parse, run)


if __name__ == "__main__":
    sys.exit(main())
