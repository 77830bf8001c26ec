"""What tests of traces share: runs recorded in every layout, and how far two traces are apart."""

from dataclasses import replace
from pathlib import Path

import torch

from core.config import load_config
from core.numerics import Numerics
from core.run_config import RunConfig
from core.stages import divide
from engine.engine import Engine
from parallel.group import Group
from support.engine_runs import greedy
from support.model_pairs import ours
from support.thread_ranks import on_every_lane, on_every_stage
from verification.engine_trace import EngineTrace
from verification.expected import COMPUTE, Compute, Expected, exact_run
from verification.mistakes import Inapplicable, Mistake
from verification.recording import Selection
from verification.trace import RequestTrace, RunNumerics, Trace
from verification.trace_reading import read_trace
from verification.weights import Weights

RUN = RunConfig(n_pages=36, max_model_len=300, max_num_seqs=6, max_num_batched_tokens=64, eager=True, prefix_reuse=False)


def engine_trace(
    path: Path, folder: Path, prompts: list[list[int]], n: int = 8, num: Numerics = Numerics(torch.float32),
    run: RunConfig = RUN, lanes: int = 1, stages: int = 1, size: int = 1, selection: Selection = Selection(),
) -> Trace:  # fmt: skip
    """What an engine over lanes or stages, of `size` ranks each, writes as it answers prompts with n tokens."""
    args = load_config(path / "config.json")

    def work(tp: Group, others: Group, world: Group, stage: int) -> None:
        dp, pp = (Group(), others) if stages > 1 else (others, Group())
        part = divide(args, stages, None, args.n_mtp_layers > 0)[stage] if stages > 1 else None
        model = ours(path, num, tp, dp=dp, stage=part)
        engine = Engine(model, None, replace(run, dp=lanes, pp=stages), world=world, pp=pp)
        with EngineTrace(engine, folder, selection):
            if world.rank:
                engine.serve()
            else:
                engine.generate(prompts, greedy(n))
                engine.close()

    if stages > 1:
        on_every_stage(stages, size, work, ordered=num.batch_invariant)
    else:
        on_every_lane(lanes, size, lambda tp, dp, world: work(tp, dp, world, 0), ordered=num.batch_invariant)
    return read_trace(folder)


def largest_difference(a: RequestTrace, b: RequestTrace) -> tuple[float, str]:
    """The largest relative difference of a point, over the positions that both have, and which point it is. All points
    of b must be there."""
    assert set(b.points) <= set(a.points), sorted(set(b.points) - set(a.points))
    worst = 0.0, ""
    for name in b.points:
        at_a, at_b = a.positions(name).tolist(), b.positions(name).tolist()
        both = [p for p in at_b if p in set(at_a)]
        assert both, name
        x = a.points[name][[at_a.index(p) for p in both]].double()
        y = b.points[name][[at_b.index(p) for p in both]].double()
        if name.endswith(".ids"):
            x, y = x.sort().values, y.sort().values
        if name.endswith(".weights"):
            x, y = x.sort().values, y.sort().values
        worst = max(worst, (float((x - y).norm() / y.norm()), name))
    return worst


def foreign_run(
    weights: Weights, tokens: list[int], mistake: Mistake | None = None, numerics: RunNumerics = RunNumerics()
) -> Trace:
    """What a program that shares no code with the engine computes of tokens, with one mistake in it at every layer that
    can have it."""

    def tolerant(point: str, how: Compute) -> Compute:
        def compute(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
            try:
                return how(e, layer, at)
            except Inapplicable:  # in a layer of another kind
                return COMPUTE[point](e.instead({}), layer, at)

        return compute

    overrides = {} if mistake is None else {point: tolerant(point, mistake.how) for point in mistake.points}
    return Trace([exact_run(weights, torch.tensor(tokens), numerics, overrides)], numerics, program="foreign")
