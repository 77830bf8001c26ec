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
from pathlib import Path
from typing import TYPE_CHECKING

from cli import main as cli
from cli.flags import Parser, add_checkpoint_flags, add_engine_flags
from core.errors import UserError
from core.sampling_params import SamplingParams, params_from_generation_config

if TYPE_CHECKING:  # torch takes seconds to import: a mistyped flag is answered without it
    from cli.batch_files import BatchItem
    from parallel.group import Group

DEFAULT = SamplingParams  # a field's default is an attribute of the class


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
    add_engine_flags(parser)
    options = parser.parse_args(arguments)
    if options.interactive == (options.input_file is not None):
        parser.error("give either --interactive or --input-file")
    if options.interactive and sys.platform == "win32":
        parser.error("--interactive takes a Unix terminal; --input-file does without")
    if options.output_file is not None and options.interactive:
        parser.error("--output-file goes with --input-file")
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
    from cli.batch_files import answer_file, check_output, read_items

    def prepare() -> tuple[SamplingParams, list["BatchItem"]]:
        params = default_params(options)
        items = [] if options.interactive else read_items(options, params)
        if options.output_file is not None:
            check_output(options.output_file, options.input_file)
        return params, items

    thinking = False if options.no_thinking else None
    engine, prepared = cli.load(options, tp, prepare, chat=not options.raw, thinking=thinking)
    if prepared is None:
        return cli.follow(engine)
    params, items = prepared
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
