"""The server's metrics for Prometheus, under vLLM's names, in a registry of their own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.engine import Engine
from engine.lanes import LaneState, add_stats

FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20)
WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)


@dataclass(frozen=True)
class Snapshot:
    """The state of the engine's lanes after a step; its thread makes one after each."""

    lanes: tuple[LaneState, ...] = (LaneState(),)

    @classmethod
    def of(cls, engine: Engine) -> "Snapshot":
        return cls(tuple(engine.lane_states))


class Metrics:
    """Histograms observe events as they happen; everything else comes from the engine's latest snapshot."""

    def __init__(self, model: str, snapshot: Callable[[], Snapshot], queued: Callable[[], int]):
        """`queued`: requests that wait outside the engine."""
        self._labels, self._snapshot, self._queued = [model], snapshot, queued
        self._registry = CollectorRegistry()
        self._registry.register(self)

        def histogram(name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                name, says, ["model_name"], registry=self._registry, buckets=buckets
            ).labels(model)  # fmt: skip

        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token", FIRST_TOKEN)
        self.next_token = histogram("inter_token_latency_seconds", "From one token to the next, of a step's tokens "
                                    "an equal share each", NEXT_TOKEN)  # fmt: skip
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the last token", WHOLE)
        self._finished = Counter("request_success", "Requests that ended, by how", ["model_name", "finished_reason"],
                                 registry=self._registry)  # fmt: skip

    def finished(self, reason: str) -> None:
        self._finished.labels(*self._labels, reason).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        lanes = self._snapshot().lanes
        stats = add_stats([lane.stats for lane in lanes])
        waiting = sum(lane.waiting for lane in lanes) + self._queued()
        for name, says, value, of_lanes in (
            ("num_requests_running", "Requests in the running batch", sum(lane.running for lane in lanes),
             [lane.running for lane in lanes]),
            ("num_requests_waiting", "Requests that wait for a place in it", waiting, [lane.waiting for lane in lanes]),
            ("kv_cache_usage_perc", "Part of the latent cache's pages in use, 1 is all",
             sum(lane.page_use for lane in lanes) / len(lanes), [lane.page_use for lane in lanes]),
        ):  # fmt: skip
            gauge = GaugeMetricFamily(name, says, labels=["model_name"])
            gauge.add_metric(self._labels, value)
            yield gauge
            if len(lanes) > 1:
                each = GaugeMetricFamily(f"lane_{name}", f"{says}, of each lane", labels=["model_name", "lane"])
                for i, of_lane in enumerate(of_lanes):
                    each.add_metric([*self._labels, str(i)], of_lane)
                yield each
        for name, says, value in (
            ("num_preemptions", "Times a request gave its pages up to an older one", stats.preemptions),
            ("prefix_cache_queries", "Prompt tokens looked for in the cache", stats.prompt),
            ("prefix_cache_hits", "Prompt tokens found in the cache", stats.reused),
            ("prompt_tokens", "Prompt tokens asked for", stats.prompt),
            ("generation_tokens", "Tokens generated", stats.generated),
            ("spec_decode_num_draft_tokens", "Tokens the MTP module proposed that were verified", sum(stats.drafted)),
            ("spec_decode_num_accepted_tokens", "Of them, accepted", sum(stats.accepted)),
        ):
            counter = CounterMetricFamily(name, says, labels=["model_name"])
            counter.add_metric(self._labels, value)
            yield counter
        if len(lanes) > 1:
            each_made = CounterMetricFamily(
                "lane_generation_tokens", "Tokens generated, of each data-parallel lane", labels=["model_name", "lane"]
            )
            for i, lane in enumerate(lanes):
                each_made.add_metric([*self._labels, str(i)], lane.stats.generated)
            yield each_made
