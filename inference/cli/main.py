"""From a command line to its exit status: what the commands have in common, with ranks and without.

No command imports torch, or what imports it, at its top: a mistyped flag is answered without it.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cli.flags import OutputError, run_config
from cli.interrupts import end_process_on_interrupt
from core.errors import UserError, describe, first_line
from core.files import require_folder
from core.run_config import RunConfig
from parallel import launcher

if TYPE_CHECKING:
    import torch

    from engine.engine import Engine
    from parallel.group import Group

T = TypeVar("T")
Options = TypeVar("Options")


# --------------------------------------------------------------------------------------------------------------------
# One process
# --------------------------------------------------------------------------------------------------------------------


def run_command(parse: Callable[[list[str]], Options], run: Callable[[Options], int]) -> int:
    """Parses the command line, imports torch, runs, and returns the exit status: that of `run`, 2 with one line for a
    UserError of either, 130 after Ctrl-C, 1 where nobody reads the output any more."""
    if sys.stdin is None:  # closed: the next file opened would pass for it
        os.open(os.devnull, os.O_RDONLY)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with interrupts_end_process():
            options = parse(sys.argv[1:])
            import torch  # noqa: F401
        return run(options)
    except UserError as e:
        complain(str(e))
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        discard_output()
        return 1
    except OutputError as e:
        complain(f"standard output: {e}")
        discard_output()
        return 1


@contextlib.contextmanager
def interrupts_end_process() -> Iterator[None]:
    """Within it Ctrl-C ends the process as end_process_on_interrupt says; after it, it is KeyboardInterrupt again."""
    end_process_on_interrupt()
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def complain(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def discard_output() -> None:
    """What is still printed goes nowhere: whoever read it has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --------------------------------------------------------------------------------------------------------------------
# Several ranks
# --------------------------------------------------------------------------------------------------------------------


def run_on_ranks(
    parse: Callable[[list[str]], argparse.Namespace],
    run: Callable[[argparse.Namespace, "Group"], int],
    *,
    handles_sigterm: bool = False,
) -> int:
    """run_command on every rank that torchrun, srun or mpirun started. `run` returns the same status on every rank, and
    raises UserError on all ranks alike. An error is printed in one line by one rank of each host.

    `handles_sigterm` is for a `run` that answers SIGTERM itself.
    """

    def parse_or_error(arguments: list[str]) -> argparse.Namespace | UserError:
        try:
            return parse(arguments)
        except UserError as e:
            if launcher.is_alone():
                raise
            return e  # raised again once all ranks are there, for rank 0 to print

    def join_and_run(options: argparse.Namespace | UserError) -> int:
        import torch

        from parallel import startup
        from parallel.failure import RankFailure
        from parallel.group import SOLO

        tp = SOLO
        try:
            tp = startup.join(RunConfig.timeout if isinstance(options, UserError) else options.timeout)
            if not handles_sigterm:
                tp.process.install_sigterm_handler()

            def usage() -> argparse.Namespace:
                if isinstance(options, UserError):
                    raise options
                return options

            status = run(tp.run_on_all_ranks(usage), tp)
            tp.shutdown()
            return status
        except UserError as e:
            if tp.rank == 0 if tp.size > 1 else launcher.is_first(of_host=True):
                complain(str(e))
            tp.shutdown()
            return 2
        except RankFailure as e:
            tp.process.abort(str(e), 1)
        except (torch.OutOfMemoryError, MemoryError) as e:
            ways = "a smaller --max-num-batched-tokens, --max-num-seqs or --kv-cache-gib needs less"
            tp.process.abort(f"rank {tp.rank} is out of memory: {first_line(e)} ({ways})", 1)
        except KeyboardInterrupt:
            tp.process.abort("interrupted", 130)
        except Exception as e:  # a mistake of ours
            traceback.print_exc()
            tp.process.abort(f"rank {tp.rank} failed: {describe(e)}", 1)

    return run_command(parse_or_error, join_and_run)


def load(
    options: argparse.Namespace,
    tp: "Group",
    prepare: Callable[[], T],
    needs: Mapping[str, Any] = {},
    *,
    chat: bool,
    thinking: bool | None = None,
) -> tuple["Engine", T | None]:
    """The engine that the flags describe, with RunConfig's fields in `needs` as they are there, and on rank 0 what
    `prepare` makes of the other flags before anything is loaded. `chat` and `thinking` are those of
    Engine.from_pretrained. Raises UserError on all ranks alike."""
    from checkpoint.manifest import require_hashes
    from engine.engine import Engine
    from parallel import startup

    _, _, local_rank, local_size = startup.environment()

    def check() -> tuple[RunConfig, "torch.device", T | None]:
        config = replace(run_config(options), **needs)
        startup.choose_threads(config.threads, local_size)
        require_folder(Path(options.ckpt_path))
        device = startup.choose_device(config.device, local_rank, local_size)
        prepared = prepare() if tp.rank == 0 else None
        return replace(config, device=device.type), device, prepared  # type: ignore[arg-type]

    config, device, prepared = tp.run_on_all_ranks(check)
    agree_on_flags(config, options, tp)
    if config.verify:
        share = local_rank, local_size
        folder, first = Path(options.ckpt_path), tp.rank == 0
        tp.run_on_all_ranks(lambda: require_hashes(folder, tp.size // config.pp, share, first, config.dp))
    if "max_num_mixed_tokens" in options:
        config = config.for_serving()
    engine = Engine.from_pretrained(
        options.ckpt_path,
        config,
        config=options.config,
        device=device,
        world=startup.on(device, tp),
        progress=True,
        chat=chat,
        thinking=thinking,
    )
    return engine, prepared


def agree_on_flags(config: RunConfig, options: argparse.Namespace, tp: "Group") -> None:
    """Raises UserError on all ranks if one was started with other flags than rank 0: they would wait for each other, or
    compute different things. `config.device` is what the rank has chosen."""
    mine = {f.name: getattr(config, f.name) for f in fields(config) if f.metadata.get("agreed")}
    others = ("raw", "trace", "trace_points", "trace_positions", "trace_mib")
    mine |= {name: getattr(options, name, None) for name in others}
    first = json.loads(bytes(tp.broadcast_ints(list(json.dumps(mine).encode()))))

    def check() -> None:
        different = [f"--{name.replace('_', '-')} {mine[name]} (rank 0: {first[name]})" for name in mine
                     if mine[name] != first[name]]  # fmt: skip
        if different:
            raise UserError(f"{', '.join(different)}: start every host with the same flags")

    tp.run_on_all_ranks(check)


def follow(engine: "Engine") -> int:
    """What every rank but 0 does until rank 0 calls `finish`; returns rank 0's exit status."""
    engine.serve()
    return engine.world.broadcast_ints([])[0]


def finish(engine: "Engine", status: int) -> int:
    """Ends the other ranks, with this exit status, and returns it. For rank 0."""
    engine.close()
    return engine.world.broadcast_ints([status])[0]
