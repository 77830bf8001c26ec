"""What an engine has done so far."""

from dataclasses import dataclass, field, replace


@dataclass
class Stats:
    """What the engine has done so far; all in tokens unless said."""

    steps: int = 0  # forwards
    prompt: int = 0  # prompt tokens asked for
    reused: int = 0  # of them found in the cache
    generated: int = 0
    preemptions: int = 0  # times a request gave its pages up to an older one
    drafted: list[int] = field(default_factory=list)  # by place in the draft: proposed and verified
    accepted: list[int] = field(default_factory=list)  # by place: of those, accepted
    sampled_steps: int = 0  # verifications, that is steps x requests that sampled
    seconds: float = 0.0  # inside step()

    def copy(self) -> "Stats":
        return replace(self, drafted=list(self.drafted), accepted=list(self.accepted))

    def __str__(self) -> str:
        lines = [
            f"{self.steps} steps, {self.generated} tokens in {self.seconds:.1f} s",
            f"{self.reused} of {self.prompt} prompt tokens found in the cache, {self.preemptions} preemptions",
        ]
        if any(self.drafted):
            rates = ", ".join(f"{a / d:.1%}" for a, d in zip(self.accepted, self.drafted, strict=True) if d)
            lines.append(f"drafts accepted by place: {rates}; {self.generated / self.sampled_steps:.2f} tokens a step")
        return "\n".join(lines)
