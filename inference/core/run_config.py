"""How a model is run: every flag of the engine, with its default and its meaning, in one frozen object.

The command lines make their flags of these fields (cli/flags.py), the engine, the memory bound and the plan read them,
and the ranks compare them at the start. No torch here: a mistyped flag is answered before it is imported.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from core.errors import UserError

PAGE_SIZE = 64  # tokens a page of the latent cache holds
MAX_DRAFTS = 4
CPU_MIXED_TOKENS = 64  # see RunConfig.for_serving

ExpertLayout = Literal["whole", "split"]  # a rank has some experts whole, or a share of every one's inner width
AskedLayout = ExpertLayout | Literal["auto"]


def flag(default: Any, help: str, metavar: str | None = None, agreed: bool = True) -> Any:
    """A field that is a command-line flag too; argparse puts the default where `help` has %(default)s. `agreed`: all
    ranks must be started with the same value."""
    return field(default=default, metadata={"help": help, "metavar": metavar, "agreed": agreed})


@dataclass(frozen=True)
class RunConfig:
    """Names are vLLM's where it has the flag. Raises UserError for values that no model can be run with."""

    dtype: Literal["auto", "bfloat16", "float32"] = flag("auto", "what to compute in")
    gemm: Literal["auto", "fp8", "bf16", "dequantised"] = flag(
        "auto",
        "quantised weights as they are, times FP8 (W8A8) or bf16 (W8A16, W4A16) activations, or dequantised at load "
        "(default: as the device allows, see docs/numerics.md)",
    )
    experts: Literal["auto", "whole", "split"] = flag(
        "auto", "a rank has some whole, or a share of each (default: as converted, else split if that fits)"
    )
    dp: int = flag(
        1,
        "data-parallel lanes of ranks, each with sequences of its own; all ranks share MLPs and experts "
        "(default: %(default)s, all ranks tensor parallel)",
        "N",
    )
    pp: int = flag(
        1, "pipeline stages of ranks, each with some of the layers: for slow links (default: %(default)s)", "N"
    )
    pp_layers: str | None = flag(
        None, "layers of each stage, such as 20,21,20 (default: balanced by cost)", "LAYERS"
    )
    device: str = flag("auto", "cpu, cuda or another that torch has (default: a GPU if there is one)", "DEVICE")
    max_model_len: int | None = flag(None, "most tokens of prompt and answer (default: as fit)", "N")
    max_num_seqs: int = flag(8, "prompts answered at a time (default: %(default)s)", "N")
    max_num_batched_tokens: int = flag(2048, "tokens one forward takes, prompts in chunks (default: %(default)s)", "N")
    max_num_mixed_tokens: int | None = flag(
        None,
        "prompt tokens a step takes while others are answered; fewer, and their answers stall less "
        f"(default: {CPU_MIXED_TOKENS} on CPUs, else as --max-num-batched-tokens)",
        "N",
    )
    kv_cache_gib: float | None = flag(None, "memory a rank gives the latent cache (default: as fits)", "GIB")
    kv_cache_dtype: Literal["auto", "fp8"] = flag("auto", "fp8: latents in 0.57 of the bytes")
    mtp: int = flag(
        0,
        f"tokens the MTP module drafts a step, 0 to {MAX_DRAFTS}; greedy answers stay the same (default: %(default)s)",
        "K",
    )
    deterministic: bool = flag(False, "bitwise the same logits for a prompt in any batch; slower")
    eager: bool = flag(False, "decode steps are not recorded: starts sooner, decodes slower")
    verify: bool = flag(False, "first compare the checkpoint with the hashes in its manifest")
    threads: int | None = flag(None, "CPU threads a rank (default: the cores over the host's ranks)", "N", agreed=False)
    timeout: float = flag(
        300, "seconds a rank waits for another before it gives up (default: %(default)s)", "S", agreed=False
    )
    # no flags: for callers in Python
    n_pages: int | None = None  # of the cache, instead of kv_cache_gib
    prefix_reuse: bool = True  # requests share the cached beginnings of their prompts

    def __post_init__(self) -> None:
        for f in fields(self):
            choices = [c for part in get_args(f.type) or () for c in (get_args(part) or (part,))]
            if choices and all(isinstance(c, str) for c in choices) and getattr(self, f.name) not in choices:
                raise UserError(f"--{f.name.replace('_', '-')} is {getattr(self, f.name)!r}, expected {choices}")
        if not 0 <= self.mtp <= MAX_DRAFTS:
            raise UserError(f"--mtp is {self.mtp}, expected from 0 to {MAX_DRAFTS}")
        if self.dp < 1 or self.pp < 1:
            raise UserError(f"--dp is {self.dp} and --pp is {self.pp}, expected at least 1")
        if self.dp > 1 and self.pp > 1:
            raise UserError(f"--dp {self.dp} and --pp {self.pp}: lanes of stages are not implemented; leave one out")
        if self.pp_layers is not None and self.pp == 1:
            raise UserError("--pp-layers needs --pp")
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < 1:
            raise UserError("--max-num-seqs and --max-num-batched-tokens must be at least 1")

    def for_serving(self) -> "RunConfig":
        """With a server's default of max_num_mixed_tokens. On CPUs a full step takes seconds, for which all answers
        would stall. `device` must be known."""
        if self.device == "cpu" and self.max_num_mixed_tokens is None:
            return replace(self, max_num_mixed_tokens=CPU_MIXED_TOKENS)
        return self

    @property
    def max_step_tokens(self) -> int:
        """Tokens of the largest forward: all decoding sequences take part in a step, whatever the budget."""
        return max(self.max_num_batched_tokens, self.max_num_seqs * (1 + self.mtp))

    @property
    def seqs_per_microbatch(self) -> int:
        """The most sequences of one microbatch of a pipeline, which has as many of them as stages."""
        return -(-self.max_num_seqs // self.pp)

    @property
    def pages_per_sequence(self) -> int:
        """Pages of one sequence of full length, with its drafts. `max_model_len` must be known."""
        assert self.max_model_len is not None
        return -(-(self.max_model_len + self.mtp) // PAGE_SIZE)
