"""Checks a checkpoint: index, files and tensors against each other and the config, and every value that it holds.

    python check_checkpoint.py /path/to/DeepSeek-V3            # reads every byte
    python check_checkpoint.py /path/to/DeepSeek-V3 --quick    # headers alone, in seconds

takes what generate.py takes: a Hugging Face directory, one that convert.py wrote, or one that the original repository's
converter wrote (with --config). The rules on headers are the loader's own, from weights.py; what is added here needs
all bytes: values that are not finite, weights of zeros, scales that are no powers of two where the config promises
them, copies that differ. All faults are told, not only the first. Memory does not depend on the checkpoint's size.

Exit status: 0 nothing found (there may be remarks); 1 faults found; 2 wrong use.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cli import interrupts

# isort: split
import torch
from tqdm import tqdm

from checkpoint.tensorfile import Entry, Reader, read_header
from checkpoint.weights import IGNORED, Checkpoint, bad_scale, choose_args, expected_tensors, require_equal
from core.config import ModelArgs
from core.errors import CheckpointError, UserError
from core.files import require_folder
from core.sampling_params import params_from_generation_config
from parallel.group import Group
from text.tokenizer import Tokenizer

CHECKS = (
    "config", "files", "tensors", "scales", "weights", "copies", "tokenizer", "chat template", "generation config"
)  # fmt: skip
WINDOW = 4 << 20  # bytes read at a time
CHUNK = 1 << 20  # bytes looked at together, while they are in the processor's cache; as many zeros in a row are a hole
BATCH = 1 << 30  # bytes a thread takes on
THREADS = 2  # one reads while the other looks
BITS = {  # of a type: the integer as wide, the mask of all but the sign, and the least magnitude that is not finite
    torch.float8_e4m3fn: (torch.uint8, 0x7F, 0x7F),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
}
MANTISSA = 0x7FFFFF  # of a float32; a power of two has none
TEXTS = (
    "The quick brown fox, 3.14159 and 1,024; don't “quote” me — it's 50 % off!",
    "  two  spaces\tand\ttabs\n\n\n  new lines\r\n" + " " * 40 + "end  ",
    "def f(x: int) -> str:\n    return f'{x!r}'  # {[()]} <tag a=\"b\"> \\n $1 ~`^|",
    "深度求索的模型，回答：今天天气很好。日本語のテキスト、한국어 문장。",
    "Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย, naïve café œuvre ß İ",
    "🙂👩‍👩‍👧‍👦🇩🇪👍🏽 e\u0301 \u200b\u00a0\u3000\u2028 𝒳 ∑∫√ ｜▁｜ \x00\x1b\x7f",
    "<｜User｜><think></think><｜end▁of▁sentence｜></s><|im_end|>[INST]",
)
CONTROL = re.compile(r"<[｜|][^<>]{1,40}[｜|]>")  # how control tokens are spelt
CONVERSATIONS = (
    [("user", "Hello, how are you?")],
    [("system", "You are brief."), ("user", "What is 3 + 4?")],
    [("user", "Name a colour."), ("assistant", "Blue."), ("user", "And <｜Assistant｜> another?")],
)
KINDS = {"hf": "Hugging Face", "converted": "converted", "upstream": "converted by the V3 repository"}


class CheckWarning(CheckpointError):
    """Worth knowing, and no fault."""


class Finding(NamedTuple):
    check: str
    problem: UserError

    @property
    def fault(self) -> bool:
        return not isinstance(self.problem, CheckWarning)

    def facts(self) -> dict[str, Any]:
        facts = {name: getattr(self.problem, name, None) or None for name in ("file", "tensor", "expected", "found")}
        told = {name: value if value is None else str(value) for name, value in facts.items()}
        return {"check": self.check, "fault": self.fault, **told, "message": str(self.problem)}


class Report:
    """What was looked at, check by check, and everything found."""

    def __init__(self, path: Path):
        self.path = path
        self.subject: dict[str, Any] = {}
        self.looked: dict[str, str] = {}  # by check, in words; one that is not there was not made
        self.current = CHECKS[0]
        self._findings: dict[str, Finding] = {}  # by text, as several ranks meet the same

    @contextlib.contextmanager
    def checking(self, check: str) -> Iterator[None]:
        """What comes belongs to this check; an error that ends it is one more finding."""
        self.current = check
        self.looked.setdefault(check, "")
        try:
            yield
        except UserError as e:
            self.add(e)

    def add(self, problem: UserError) -> None:
        about_config = os.path.basename(str(getattr(problem, "file", ""))) == "config.json"
        self._findings.setdefault(str(problem), Finding("config" if about_config else self.current, problem))

    @property
    def findings(self) -> list[Finding]:
        def place(finding: Finding) -> tuple[int, str, str, str]:
            file, tensor = (str(getattr(finding.problem, name, None) or "") for name in ("file", "tensor"))
            return CHECKS.index(finding.check), file, tensor, str(finding.problem)

        return sorted(self._findings.values(), key=place)

    @property
    def ok(self) -> bool:
        return not any(finding.fault for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        found = self.findings
        checks = [
            {
                "check": check,
                "ok": not any(f.fault for f in found if f.check == check) if check in self.looked else None,
                "looked_at": self.looked.get(check),
            }
            for check in CHECKS
        ]
        subject = {"checkpoint": str(self.path), "ok": self.ok} | self.subject
        return subject | {"checks": checks, "findings": [finding.facts() for finding in found]}

    def lines(self) -> Iterator[str]:
        found, about = self.findings, self.subject
        size = f"{about['files']:,} files, {about['tensors']:,} tensors, {about['bytes'] / 1e9:.2f} GB"
        yield f"{self.path}: {about['kind']}; {size}; {about['seconds']:.1f} s"
        for check in CHECKS:
            of_it = [finding for finding in found if finding.check == check]
            mark = "–" if check not in self.looked else "✗" if any(f.fault for f in of_it) else "!" if of_it else "✓"
            count = f"{len(of_it)} finding{'s' * (len(of_it) > 1)}" if of_it else ""
            yield f"{mark} {check:<19}{'; '.join(filter(None, (count, self.looked.get(check, 'not looked at'))))}"
        if found:
            yield ""
        yield from (str(f.problem) if f.fault else f"remark: {f.problem}" for f in found)


def check(path: Path, quick: bool = False, config: Path | None = None) -> Report:
    """Everything that can be said of a checkpoint; `quick` leaves out what needs more than the headers.

    Raises UserError for wrong use: no such directory, a --config that cannot be read or is missing and needed.
    """
    start = time.perf_counter()
    require_folder(path)
    report = Report(path)
    checkpoint, args = open_checkpoint(path, config, report)
    parts = {} if checkpoint is None else read_headers(checkpoint, args, report)
    entries = {(e.file, e.name): e for part in parts.values() for e in part.values()}
    if checkpoint is not None and not quick:
        check_values(list(entries.values()), args, report)
        check_copies(parts, checkpoint, args, report)
    check_text(path, args, report)
    files = {file for file, _ in entries}
    report.subject = {
        "kind": KINDS[checkpoint.kind] if checkpoint is not None else "no checkpoint that can be told",
        "quick": quick, "files": len(files), "tensors": len(entries),
        "bytes": sum(e.nbytes for e in entries.values()), "seconds": round(time.perf_counter() - start, 3),
    }  # fmt: skip
    return report


# --------------------------------------------------------------------------------------------------------------------
# Headers
# --------------------------------------------------------------------------------------------------------------------


def open_checkpoint(path: Path, config: Path | None, report: Report) -> tuple[Checkpoint | None, ModelArgs | None]:
    """The checkpoint, if it can be told what it is, and what its config says, if that can be used."""
    checkpoint: Checkpoint | None = None
    with report.checking("files"):
        check_links(path, report)
        checkpoint = Checkpoint(path, report.add)
    if checkpoint is None:
        for file in sorted(path.glob("*.safetensors")):
            with report.checking("files"):
                read_header(file)
        return None, None
    if checkpoint.kind == "upstream" and config is None and checkpoint.args is None:
        raise UserError(f"{path} has no config.json; name its model with --config configs/…")
    args: ModelArgs | None = None
    with report.checking("config"):
        if checkpoint.args is not None or not (path / "config.json").is_file():
            args = choose_args(checkpoint, config)
    if args is not None:
        report.looked["config"] = f"{args.n_layers} layers, {args.n_routed_experts} experts, {args.dtype}"
    return checkpoint, args


def check_links(path: Path, report: Report) -> None:
    """A checkpoint's files are its own, or, as Hugging Face keeps them, in the `blobs` beside its `snapshots`."""
    here = os.path.realpath(path)
    homes = {here, os.path.join(os.path.dirname(os.path.dirname(here)), "blobs")}
    for file in sorted(path.iterdir()):
        if file.is_symlink() and not os.path.isdir(file) and os.path.dirname(os.path.realpath(file)) not in homes:
            target = os.readlink(file)
            text = f"{file}: expected a file of this directory, found a link to {target!r}"
            report.add(CheckpointError(text, file, "", "a file of this directory", f"a link to {target!r}"))


def read_headers(checkpoint: Checkpoint, args: ModelArgs | None, report: Report) -> dict[Group, dict[str, Entry]]:
    """Each rank's tensors: by our names those that are as the config has them, by the files' own names the others."""
    parts: dict[Group, dict[str, Entry]] = {}
    for size in checkpoint.ranks or (1,):
        for rank in range(min(size, len(checkpoint.files))):  # of a rank without a file, rank 0 tells
            group = Group(rank, size)
            with report.checking("files"):
                on_disk = checkpoint.on_disk(group)
                parts[group] = {name: entry for name, entry in on_disk.items() if not name.endswith(IGNORED)}
            if args is None or group not in parts:
                continue
            with report.checking("tensors"):
                found = checkpoint.match(args, group)
                known = {entry.name for entry in found.values()}
                parts[group] = found | {name: e for name, e in parts[group].items() if e.name not in known}
    with report.checking("tensors"):
        if args is not None and args.n_mtp_layers and not checkpoint.has_mtp and checkpoint.kind != "upstream":
            raise CheckWarning(f"{checkpoint.path}: no MTP module, though its config names one", checkpoint.path)
    report.looked["files"] = f"{len(checkpoint.files):,} files: index, names, headers"
    if args is None:
        del report.looked["tensors"]
    else:
        count = sum(map(len, parts.values()))
        report.looked["tensors"] = f"{count:,} tensors: names, shapes and dtypes as the config has them"
    return parts


# --------------------------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------------------------


def check_values(entries: list[Entry], args: ModelArgs | None, report: Report) -> None:
    """Reads every byte, in the order it lies on disk, several batches of tensors at a time."""
    powers = args is not None and args.scale_fmt == "ue8m0"
    batches: list[list[Entry]] = []
    room = 0
    for entry in sorted(entries, key=lambda e: (e.file, e.start)):
        if entry.nbytes > room:
            batches.append([])
            room = BATCH
        batches[-1].append(entry)
        room -= entry.nbytes
    stopping = threading.Event()

    def look_at(batch: list[Entry]) -> list[tuple[str, UserError]]:
        wanted = itertools.takewhile(lambda _: not stopping.is_set(), batch)
        return list(look(wanted, powers, bar.update))

    with (
        tqdm(total=sum(e.nbytes for e in entries), unit="B", unit_scale=True, desc="checking") as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        try:
            for problems in pool.map(look_at, batches):
                for check, problem in problems:
                    with report.checking(check):
                        raise problem
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    scales = sum(is_scale(entry) for entry in entries)
    report.looked["scales"] = f"{scales:,} tensors: finite, positive{', powers of two' * powers}"
    report.looked["weights"] = f"{len(entries) - scales:,} tensors: finite, not zero"


def is_scale(entry: Entry) -> bool:
    return entry.name.endswith((".scale", "_scale_inv")) and entry.dtype == torch.float32


def look(batch: Iterable[Entry], powers: bool, progress: Callable[[int], object]) -> Iterator[tuple[str, UserError]]:
    """What is wrong with the values of some tensors, each with the check it belongs to."""
    scratch = torch.empty(CHUNK, dtype=torch.uint8)
    with Reader(WINDOW) as reader:
        for entry in batch:
            check = "scales" if is_scale(entry) else "weights"
            try:
                if is_scale(entry):
                    found = scale_problems(entry, reader, powers)
                else:
                    found = weight_problems(entry, reader, scratch)
                yield from ((check, problem) for problem in found)
            except UserError as e:  # its bytes cannot be read, or are not those that were written
                yield check, e
            progress(entry.nbytes)


def scale_problems(entry: Entry, reader: Reader, powers: bool) -> Iterator[CheckpointError]:
    scale = reader.read(entry)
    if problem := bad_scale(entry, scale):
        yield problem
    elif powers and (odd := (scale.view(torch.int32) & MANTISSA).nonzero()).numel():
        at = odd[0].tolist()
        wanted, found = "powers of two (scale_fmt ue8m0)", f"{scale[tuple(at)].item()} at {at}, {len(odd)} such"
        released = ".o_proj." in entry.name or ".wo." in entry.name  # V3.1-Terminus
        kind = CheckWarning if released else CheckpointError
        yield kind(f"{entry}: expected {wanted}, found {found}", entry.file, entry.name, wanted, found)


def weight_problems(entry: Entry, reader: Reader, scratch: torch.Tensor) -> Iterator[CheckpointError]:
    """Values that are not finite, and zeros where there cannot be so many. Compares bits, as integers."""

    def damage(wanted: str, found: str) -> CheckpointError:
        return CheckpointError(f"{entry}: expected {wanted}, found {found}", entry.file, entry.name, wanted, found)

    if entry.dtype not in BITS or not entry.nbytes:
        return
    integer, mask, limit = BITS[entry.dtype]
    scratch = scratch.view(integer)
    count = first = at = zeros = most = 0
    for _, window in reader.rows(entry):
        for chunk in window.view(-1).view(integer).split(len(scratch)):
            bits = torch.bitwise_and(chunk, mask, out=scratch[: len(chunk)])
            largest = int(bits.amax())
            if largest >= limit:
                bad = (bits >= limit).nonzero()
                first = at + int(bad[0]) if not count else first
                count += len(bad)
            zeros = 0 if largest else zeros + len(chunk)
            most = max(most, zeros)
            at += len(chunk)
    if count:
        place = [int(i) for i in torch.unravel_index(torch.tensor(first), entry.shape)]
        yield damage("finite values", f"NaN or infinity at {place}, {count:,} such")
    if most == at and not may_be_zero(entry.name):
        yield damage("weights", "nothing but zeros")
    elif most * entry.dtype.itemsize >= CHUNK and most < at and not may_have_gaps(entry.name):
        yield damage("weights", f"{most:,} zeros in a row of {at:,} values")


def may_be_zero(name: str) -> bool:
    """A router's bias starts at zero and stays there where no load had to be balanced."""
    return name.endswith("bias")


def may_have_gaps(name: str) -> bool:
    """Rows of tokens that do not exist fill the vocabulary up."""
    return may_be_zero(name) or name.endswith(("embed.weight", "embed_tokens.weight", "head.weight"))


def check_copies(
    parts: dict[Group, dict[str, Entry]], checkpoint: Checkpoint, args: ModelArgs | None, report: Report
) -> None:
    """Tensors that are there more than once: the MTP module's embedding and head, and what every rank has whole."""
    if args is None:
        return
    specs = expected_tensors(args, checkpoint.quantised, checkpoint.has_mtp)
    whole = {name for name, spec in specs.items() if spec.split is None}
    pairs: list[tuple[Entry, Entry]] = []
    for group, part in parts.items():
        if args.tie_word_embeddings and "embed.weight" in part and "head.weight" in part:
            pairs.append((part["embed.weight"], part["head.weight"]))
        for name in ("embed.weight", "head.weight"):
            main = part.get(name) or part.get("embed.weight")  # a tied head is the embedding
            if main is not None and (copy := part.get(f"mtp.0.{name}")) is not None:
                pairs.append((main, copy))
        if group.rank:
            first = parts.get(Group(0, group.size), {})
            pairs += [(first[name], part[name]) for name in sorted(whole & part.keys() & first.keys())]
    for main, copy in pairs:
        with report.checking("copies"):
            require_equal(main, copy)
    report.looked["copies"] = f"{len(pairs):,} pairs of equal tensors"


# --------------------------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------------------------


def check_text(path: Path, args: ModelArgs | None, report: Report) -> None:
    """Tokenizer, chat template and generation_config.json."""
    tokenizer: Tokenizer | None = None
    with report.checking("tokenizer"):
        tokenizer = Tokenizer(path, None if args is None else args.vocab_size)
        check_tokenizer(tokenizer, path / "tokenizer.json", args, report)
    if tokenizer is not None and tokenizer.has_chat_template:
        with report.checking("chat template"):
            check_template(tokenizer, path, report)
    elif tokenizer is not None:
        with report.checking("chat template"):
            report.looked["chat template"] = "none"
            raise CheckWarning(f"{path}: no chat template: a base model, for generate.py --raw", path)
    with report.checking("generation config"):
        params_from_generation_config(path)
        report.looked["generation config"] = "readable" if (path / "generation_config.json").exists() else "none"


def check_tokenizer(tokenizer: Tokenizer, file: Path, args: ModelArgs | None, report: Report) -> None:
    rows = f" of {args.vocab_size:,} rows" if args is not None else ""
    report.looked["tokenizer"] = f"{tokenizer.size:,} ids{rows}; {len(TEXTS)} texts there and back"
    if args is not None and tokenizer.size < args.vocab_size // 2:
        wanted, found = f"about {args.vocab_size} ids, the rows of the embedding", f"{tokenizer.size}"
        report.add(CheckpointError(f"{file}: expected {wanted}, found {found}", file, "", wanted, found))
    for text in TEXTS:
        if (back := tokenizer.decode(tokenizer.encode_text(text))) != text:
            report.add(CheckpointError(f"{file}: expected {text!r} back, found {back!r}", file, "", text, back))


def check_template(tokenizer: Tokenizer, path: Path, report: Report) -> None:
    """Renders conversations; each must begin with at most one BOS, hold what was said, and name no unknown token."""
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        prompt, text = tokenizer.encode_chat(messages), tokenizer.render_chat(messages)
        if tokenizer.bos_id is not None and (n := prompt.count(tokenizer.bos_id)) > 1:
            report.add(
                CheckpointError(f"{path}: the chat template: expected one BOS, found {n}", path, "", "one BOS", n)
            )
        for content in (content for role, content in turns if role != "assistant" and content not in text):
            wanted = f"{content!r} in the prompt"
            report.add(
                CheckpointError(f"{path}: the chat template: expected {wanted}, found {text!r}", path, "", wanted, text)
            )
        said = "".join(content for _, content in turns)
        for token in set(CONTROL.findall(text)) - tokenizer.control_tokens:
            if token not in said:
                file = path / "tokenizer.json"
                wrong = f"{file}: expected the chat template's {token!r}, found no such token"
                report.add(CheckpointError(wrong, file, "", token, "no such token"))
    report.looked["chat template"] = f"{len(CONVERSATIONS)} conversations rendered"


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------


def main() -> int:
    interrupts.heed()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory of the checkpoint")
    parser.add_argument("--quick", action="store_true", help="headers alone, no weights or scales: takes seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the model's config, where the directory has none")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    torch.set_num_threads(1)  # each of THREADS its own core
    try:
        report = check(options.checkpoint, options.quick, options.config)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    try:
        print(json.dumps(report.as_json(), indent=1) if options.json else "\n".join(report.lines()), flush=True)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
