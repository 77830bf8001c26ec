"""Says why ranks do not find each other, hang or are slow: versions, interfaces, every link and every collective.

  torchrun --nproc-per-node 8 check_network.py
  torchrun --nnodes 2 --nproc-per-node 8 --node-rank $RANK --master-addr $ADDR check_network.py --ckpt-path CKPT
  srun --ntasks 16 --gpus-per-task 1 python check_network.py --expected 450 50

compares programs, devices, variables and (--ckpt-path) checkpoints of all ranks; sends between every two ranks of a
host and, from host to host, between ranks with the same local number; runs the engine's collectives within each host,
along each rail (ranks with the same local number) and over all ranks; and checks what arrives. It talks over NCCL on
GPUs and gloo elsewhere. A link that is dead, wrong or slow is named with its ranks and hosts, and no test waits for
ever.

Exit status: 0 nothing wrong; 1 a difference, a dead or slow link, a wrong sum or a lost rank; 2 wrong use.
"""

if __name__ == "__main__":
    from cli.interrupts import end_process_on_interrupt

    end_process_on_interrupt()

import argparse
import contextlib
import json
import os
import re
import sys
from pathlib import Path

from cli.flags import Parser, device, output_errors, positive_number, seconds
from cli.main import complain, run_command
from core.errors import UserError
from parallel import launcher

ON_GPUS, ON_CPUS = "16K 1M 64M".split(), "16K 1M 4M".split()
GPU_LINKS = (450.0, 50.0)  # GB/s one way: NVLink of an H100, a 400 Gb/s InfiniBand port
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Raises UserError for wrong use."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt-path", type=Path, metavar="DIR", help="also compare this checkpoint's config and headers on all ranks")
    add("--sizes", type=size, nargs="+", metavar="BYTES",
        help=f"of what is sent (default: {' '.join(ON_GPUS)} on GPUs, {' '.join(ON_CPUS)} on CPUs)")  # fmt: skip
    add("--expected", type=positive_number("GB/s", 1e5), nargs=2, metavar="GB/S",
        help="of a link within a host and between hosts, one way; less than --share of it is wrong "
             f"(default: {GPU_LINKS[0]:g} {GPU_LINKS[1]:g} on GPUs, shown only)")  # fmt: skip
    add("--share", type=share, default=0.5, metavar="X",
        help="a link is slow below X times the median of its kind (default: 0.5)")  # fmt: skip
    add("--timeout", type=seconds, default=20.0, metavar="S",
        help="seconds that a rank waits for another in one test (default: 20)")  # fmt: skip
    add("--device", type=device, default="auto", metavar="DEVICE",
        help="auto, cpu or cuda (default: a GPU if there is one)")  # fmt: skip
    add("--json", action="store_true", help="one JSON object")
    return parser.parse_args(arguments)


def size(text: str) -> int:
    """Bytes, such as 65536, 64K or 1M."""
    found = re.fullmatch(r"(\d+)([KMG]?)", text)
    if not found or not 64 <= (n := int(found[1]) * UNITS[found[2]]) <= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 64 bytes to 4G")
    return n


def share(text: str) -> float:
    if not 0 < (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def run(options: argparse.Namespace) -> int:
    """One rank's part; rank 0 prints. Returns the exit status, on all ranks alike. Raises UserError."""
    import torch

    from parallel import network, network_facts, network_report, startup

    torch.set_num_threads(1)
    launch = launcher.find()
    on = startup.choose_device(options.device, launch.local_rank, launch.local_size)
    gpu = on.type != "cpu"
    sizes = sorted(set(options.sizes or map(size, ON_GPUS if gpu else ON_CPUS)))
    figures = options.expected or (GPU_LINKS if gpu else ())
    expected = dict(zip((network_report.NODE, network_report.BETWEEN), figures, strict=False))
    thresholds = network_report.Thresholds(options.share, expected, options.expected is not None)
    facts = network_facts.collect(launch, on, options.ckpt_path)
    rendezvous = None
    if launch.size == 1:
        found = network.Findings([facts])
    else:
        try:
            rendezvous = network.join(launch, options.timeout)
            found = network.run_tests(rendezvous, facts, on, sizes, thresholds.find_slow)
            if launch.rank != 0:
                return network.finish(rendezvous, 0)
        except network.LostContact as e:
            if launch.local_rank == 0:
                complain(str(e))
            return 1
    report = network_report.report(found, thresholds, "NCCL" if gpu else "gloo", launch.size)
    status = 0 if report["ok"] else 1
    try:
        with output_errors():
            print(json.dumps(report, indent=1) if options.json else "\n".join(network_report.lines(report)), flush=True)
    finally:
        if rendezvous is not None:
            network.finish(rendezvous, status)
    return status


def main() -> int:
    def parse_once(arguments: list[str]) -> argparse.Namespace:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what a lost link means is said here
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # torchrun's 1 has NCCL end the process of a dead link
        try:
            return parse(arguments)
        except UserError:
            if not launcher.is_first():
                sys.exit(2)
            raise

    return run_command(parse_once, run)


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)  # a thread may be waiting for a link that is dead
