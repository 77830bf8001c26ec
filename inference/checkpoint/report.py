"""What a check of a checkpoint found, for people and as JSON."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import CheckWarning, UserError

CHECKS = (
    "config", "files", "tensors", "scales", "weights", "copies", "tokenizer", "chat template", "generation config"
)  # fmt: skip


class CheckResult(NamedTuple):
    """One thing that a check found: a fault, or a warning."""

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
    """What each check covered and everything that was found."""

    def __init__(self, path: Path):
        self.path = path
        self.subject: dict[str, Any] = {}
        self.looked: dict[str, str] = {}  # by check: what it covered, in words
        self.absent: dict[str, str] = {}  # by check: why there was nothing to look at, in words
        self.current = CHECKS[0]
        self._findings: dict[str, CheckResult] = {}  # by text, as several ranks meet the same

    @contextlib.contextmanager
    def checking(self, check: str) -> Iterator[None]:
        """Attributes results within the context to this check; a UserError that ends it is one of them."""
        self.current = check
        try:
            yield
        except UserError as e:
            self.add(e)

    def cover(self, check: str, covered: str, count: int = 1) -> None:
        """Records what a check covered, in words; with a count of 0, that there was nothing to look at."""
        (self.looked if count else self.absent)[check] = covered

    def add(self, problem: UserError) -> None:
        about_config = os.path.basename(str(getattr(problem, "file", ""))) == "config.json"
        self._findings.setdefault(str(problem), CheckResult("config" if about_config else self.current, problem))

    @property
    def findings(self) -> list[CheckResult]:
        def place(finding: CheckResult) -> tuple[int, str, str, str]:
            file, tensor = (str(getattr(finding.problem, name, None) or "") for name in ("file", "tensor"))
            return CHECKS.index(finding.check), file, tensor, str(finding.problem)

        return sorted(self._findings.values(), key=place)

    @property
    def ok(self) -> bool:
        return not any(finding.fault for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        found = self.findings
        failed = {finding.check for finding in found if finding.fault}
        checks = [
            {
                "check": check,
                "ok": False if check in failed else True if check in self.looked else None,
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
            mark = "✗" if any(f.fault for f in of_it) else "!" if of_it else "✓" if check in self.looked else "–"
            count = f"{len(of_it)} finding{'s' * (len(of_it) > 1)}" if of_it else ""
            covered = self.looked.get(check) or self.absent.get(check) or ("" if of_it else "not looked at")
            yield f"{mark} {check:<19}{'; '.join(filter(None, (count, covered)))}"
        if found:
            yield ""
        yield from (str(f.problem) if f.fault else f"warning: {f.problem}" for f in found)
