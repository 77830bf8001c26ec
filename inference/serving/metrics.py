"""The server's metrics for Prometheus, under vLLM's names, in a registry of their own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.engine import Engine

FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20)
WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)


@dataclass(frozen=True)
class Snapshot:
    """The engine's counters after a step; its thread makes one after each."""

    running: int = 0
    waiting: int = 0
    page_use: float = 0.0  # part of the latent cache's pages in use
    preemptions: int = 0
    prompt: int = 0
    reused: int = 0
    generated: int = 0
    drafted: int = 0
    accepted: int = 0

    @classmethod
    def of(cls, engine: Engine) -> "Snapshot":
        pool, stats = engine.scheduler.pool, engine.stats
        return cls(
            len(engine.scheduler.running), len(engine.scheduler.waiting), 1 - pool.n_available / pool.n_pages,
            stats.preemptions, stats.prompt, stats.reused, stats.generated, sum(stats.drafted), sum(stats.accepted),
        )  # fmt: skip


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
        now = self._snapshot()
        waiting = now.waiting + self._queued()
        for name, says, value in (
            ("num_requests_running", "Requests in the running batch", now.running),
            ("num_requests_waiting", "Requests that wait for a place in it", waiting),
            ("kv_cache_usage_perc", "Part of the latent cache's pages in use, 1 is all", now.page_use),
        ):
            gauge = GaugeMetricFamily(name, says, labels=["model_name"])
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, says, value in (
            ("num_preemptions", "Times a request gave its pages up to an older one", now.preemptions),
            ("prefix_cache_queries", "Prompt tokens looked for in the cache", now.prompt),
            ("prefix_cache_hits", "Prompt tokens found in the cache", now.reused),
            ("prompt_tokens", "Prompt tokens asked for", now.prompt),
            ("generation_tokens", "Tokens generated", now.generated),
            ("spec_decode_num_draft_tokens", "Tokens the MTP module proposed that were verified", now.drafted),
            ("spec_decode_num_accepted_tokens", "Of them, accepted", now.accepted),
        ):
            counter = CounterMetricFamily(name, says, labels=["model_name"])
            counter.add_metric(self._labels, value)
            yield counter
