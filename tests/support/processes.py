"""A tiny checkpoint, and the ways of starting generate.py on it: in this process, as ranks of our own, by torchrun."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from support.checkpoints import fp8_sizes, make_checkpoint
from support.families import FAMILIES
from support.tiny_tokenizer import VOCAB_SIZE, write_tokenizer

SCRIPT = Path(__file__).parents[2] / "inference" / "generate.py"
CONFIG = {**FAMILIES["v3"], **fp8_sizes(2), "vocab_size": VOCAB_SIZE, "num_hidden_layers": 2, "n_routed_experts": 16}
EOS_ID = 1


def make_tiny(folder: Path, fp8: bool = True, printable: bool = False) -> Path:
    """A random checkpoint that splits over two ranks and never says its end token; nor, if `printable`, anything but
    printable ASCII."""
    make_checkpoint(folder, CONFIG, fp8=fp8)
    write_tokenizer(folder)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    spoken = {vocabulary[chr(code)] for code in range(0x21, 0x7F)} if printable else set(range(VOCAB_SIZE)) - {EOS_ID}
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if "lm_head.weight" in tensors:
            head = tensors["lm_head.weight"]
            head[[i for i in range(VOCAB_SIZE) if i not in spoken]] = 0
            save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def environment(**more: str) -> dict[str, str]:
    """One thread a process, whatever machine this is, and none of a launcher's variables but those given."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {n: value for n, value in os.environ.items() if n not in ranks and not n.startswith(("SLURM_", "OMPI_"))}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1"} | more


def command(*flags: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, flags)]


def torchrun(*flags: object, ranks: int = 2, script: Path = SCRIPT) -> list[str]:
    port = free_port()
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port)]
    return [sys.executable, *launcher, str(script), *map(str, flags)]


def start_rank(
    rank: int, size: int, port: int, *flags: object, run: list[str] | None = None, agent: bool = False
) -> subprocess.Popen[str]:
    """One rank without torchrun, which starts faster and ends nobody else's rank. `run`: another command to run;
    `agent`: the meeting point at the port is kept by another process than rank 0."""
    environment = rank_environment(rank, size, port) | {"PYTHONPATH": str(SCRIPT.parent)}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"} if agent else {}
    return subprocess.Popen(
        run or command(*flags),
        env=environment,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    return environment(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def errors(stderr: str) -> list[str]:
    """Our own lines of error."""
    return [line for line in stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
