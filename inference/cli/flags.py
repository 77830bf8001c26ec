"""What the command lines that run a model have in common: the engine's flags, the ranks, and how a run ends."""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from cli import interrupts
from core.config import PROGRAM_VERSION
from core.errors import UserError, describe, first_line
from core.files import require_folder

if TYPE_CHECKING:  # torch takes seconds to import: a mistyped flag is answered without it
    import torch

    from engine.engine import Engine
    from parallel.group import Group

T = TypeVar("T")
TIMEOUT = 300.0
CPU_MIXED_TOKENS = 64  # see mixed_tokens


# --------------------------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Raises UserError for wrong use, and lets only rank 0 speak."""

    def __init__(self, description: str | None) -> None:
        """The description is shown as it is written."""
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")

    def _print_message(self, message: str, file: Any = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super()._print_message(message, file)


def add_checkpoint_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--ckpt-path", required=True, metavar="DIR", help="checkpoint: Hugging Face's, or converted by convert.py")
    add("--config", metavar="FILE", help="the model's config, where the checkpoint has no config.json")


def add_engine_flags(parser: Parser) -> None:
    """What `load` reads, and the version, which names the program."""
    add = parser.add_argument
    add("--verify", action="store_true", help="first compare the checkpoint with the hashes in its manifest")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="what to compute in")
    add("--gemm", choices=("auto", "fp8", "bf16"), default="auto",
        help="FP8 weights times FP8 (W8A8) or bf16 (W8A16) activations (default: as the GPU allows)")  # fmt: skip
    add("--experts", choices=("auto", "whole", "split"), default="auto",
        help="a rank has some whole, or a share of each (default: as converted, else split if that fits)")  # fmt: skip
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: a GPU if there is one")
    add("--max-model-len", type=positive, metavar="N", help="most tokens of prompt and answer (default: as fit)")
    add("--max-num-seqs", type=positive, default=8, metavar="N", help="prompts answered at a time (default: 8)")
    add("--max-num-batched-tokens", type=positive, default=2048, metavar="N",
        help="tokens one forward takes, prompts in chunks (default: 2048)")  # fmt: skip
    add("--kv-cache-gib", type=gib, metavar="GIB", help="memory a rank gives the latent cache (default: as fits)")
    add("--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="fp8: latents in 0.57 of the bytes")
    add("--mtp", type=int, default=0, metavar="K",
        help="tokens the MTP module drafts a step, 0 to 4; greedy answers stay the same (default: 0)")  # fmt: skip
    add("--deterministic", action="store_true", help="bitwise the same logits for a prompt in any company; slower")
    add("--eager", action="store_true", help="no CUDA graphs: starts sooner, decodes slower")
    add("--threads", type=positive, metavar="N", help="CPU threads a rank (default: the cores over the host's ranks)")
    add("--timeout", type=seconds, default=TIMEOUT, metavar="S",
        help="seconds a rank waits for another before it gives up (default: 300)")  # fmt: skip
    add("--version", action="version", version=f"{parser.prog} {PROGRAM_VERSION}")


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def gib(text: str) -> float:
    if not 0 < (value := float(text)) < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of GiB")
    return value


def seconds(text: str) -> float:
    if not 1 <= (value := float(text)) <= 7 * 86400:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 second to a week")
    return value


# --------------------------------------------------------------------------------------------------------------------
# Ranks
# --------------------------------------------------------------------------------------------------------------------


def load(
    options: argparse.Namespace, tp: "Group", prepare: Callable[[], T], *, chat: bool, thinking: bool | None = None
) -> tuple["Engine", T | None]:
    """The engine that the flags describe, and on rank 0 what `prepare` makes of the other flags before anything is
    loaded. `chat` and `thinking` are Engine.from_pretrained's. Raises UserError on all ranks alike."""
    from checkpoint.manifest import require_hashes
    from engine.engine import Engine
    from parallel import group as parallel

    _, _, local_rank, local_size = parallel.environment()

    def check() -> tuple["torch.device", T | None]:
        parallel.choose_threads(options.threads, local_size)
        require_folder(Path(options.ckpt_path))
        device = choose_device(options.device, local_rank, local_size)
        return device, prepare() if tp.rank == 0 else None

    device, prepared = tp.run_on_all_ranks(check)
    agree_on_flags(options, device, tp)
    if options.verify:
        share = local_rank, local_size
        tp.run_on_all_ranks(lambda: require_hashes(Path(options.ckpt_path), tp.size, share, progress=tp.rank == 0))
    engine = Engine.from_pretrained(
        options.ckpt_path,
        config=options.config,
        device=device,
        dtype=options.dtype,
        gemm=options.gemm,
        tp=parallel.on(device, tp),
        progress=True,
        chat=chat,
        thinking=thinking,
        kv_cache_dtype=options.kv_cache_dtype,
        experts=options.experts,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_mixed_tokens=mixed_tokens(options, device),
        kv_cache_gib=options.kv_cache_gib,
        mtp=options.mtp,
        deterministic=options.deterministic,
        eager=options.eager,
    )
    return engine, prepared


def mixed_tokens(options: argparse.Namespace, device: "torch.device") -> int | None:
    """What a step may take of prompts while others are being answered: a server's flag, which on a CPU has a default,
    for there a full step takes seconds. Elsewhere nobody watches the answers grow."""
    if "max_num_mixed_tokens" not in options:
        return None
    return options.max_num_mixed_tokens or (CPU_MIXED_TOKENS if device.type == "cpu" else None)


def choose_device(name: str, local_rank: int, local_size: int) -> "torch.device":
    """This rank's device. Raises UserError when a GPU is asked for and missing, or there are more ranks than GPUs."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU that this build of torch can use")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_size > (gpus := torch.cuda.device_count()):
        raise UserError(
            f"{local_size} ranks on a host with {gpus} GPU{'s' * (gpus > 1)}: start as many, or --device cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def agree_on_flags(options: argparse.Namespace, device: "torch.device", tp: "Group") -> None:
    """Ranks that were started differently would wait for each other, or compute different things, without a word."""
    names = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_num_mixed_tokens", "kv_cache_gib",
             "kv_cache_dtype", "mtp", "deterministic", "eager", "dtype", "gemm", "experts", "raw",
             "verify")  # fmt: skip
    mine = {"device": device.type, **{name: getattr(options, name, None) for name in names}}
    first = json.loads(bytes(tp.broadcast_ints(list(json.dumps(mine).encode()))))

    def check() -> None:
        different = [f"--{name.replace('_', '-')} {mine[name]} (rank 0: {first[name]})" for name in mine
                     if mine[name] != first[name]]  # fmt: skip
        if different:
            raise UserError(f"{', '.join(different)}: start every host with the same flags")

    tp.run_on_all_ranks(check)


def follow(engine: "Engine") -> int:
    """What every rank but 0 does until rank 0 is done; returns rank 0's exit status."""
    engine.serve()
    return engine.tp.broadcast_ints([])[0]


def finish(engine: "Engine", status: int) -> int:
    """Rank 0: lets the other ranks go, with its exit status."""
    engine.close()
    return engine.tp.broadcast_ints([status])[0]


# --------------------------------------------------------------------------------------------------------------------
# Beginning and end
# --------------------------------------------------------------------------------------------------------------------


def complain(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def main(
    parse: Callable[[list[str]], argparse.Namespace],
    run: Callable[[argparse.Namespace, "Group"], int],
    *,
    heeds_signals: bool = False,
) -> int:
    """Runs a command line on every rank and returns its exit status. `parse` raises UserError for wrong use; `run`
    returns the same status on every rank, and raises UserError on all ranks alike. What goes wrong is told in one line.

    `heeds_signals` is for a `run` that answers SIGTERM itself.
    """
    if sys.stdin is None:  # closed: the next file opened would pass for it
        os.open(os.devnull, os.O_RDONLY)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    problem = None
    try:
        options = parse(sys.argv[1:])
    except UserError as e:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            complain(str(e))
            return 2
        problem = e  # told once all ranks are there, by rank 0
    import torch

    from parallel import group as parallel

    interrupts.heed()
    tp = parallel.SOLO
    try:
        tp = parallel.join(TIMEOUT if problem else options.timeout)
        if not heeds_signals:
            tp.install_sigterm_handler()

        def usage() -> None:
            if problem is not None:
                raise problem

        tp.run_on_all_ranks(usage)
        status = run(options, tp)
        tp.shutdown()
        return status
    except UserError as e:
        if tp.rank == 0:
            complain(str(e))
        tp.shutdown()
        return 2
    except parallel.RankFailure as e:
        tp.abort(str(e), 1)
    except (torch.OutOfMemoryError, MemoryError) as e:
        ways = "a smaller --max-num-batched-tokens, --max-num-seqs or --kv-cache-gib needs less"
        tp.abort(f"rank {tp.rank} is out of memory: {first_line(e)} ({ways})", 1)
    except KeyboardInterrupt:
        tp.abort("interrupted", 130)
    except Exception as e:  # a mistake of ours
        traceback.print_exc()
        tp.abort(f"rank {tp.rank} failed: {describe(e)}", 1)
