"""Counters for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by route and outcome", ("route", "outcome"))
        self.tokens = self._counter("tokens", "Tokens by kind: prompt, cached, image, completion", ("kind",))
        self.waiting = Gauge("qvl_requests_active", "Requests waiting or under way", registry=self.registry)
        self.first_token = Histogram(
            "qvl_first_token_seconds",
            "From a request to its first token",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.seconds = self._counter(
            "seconds", "Seconds by kind of work: encode, prefill, generate", ("kind",)
        )

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"qvl_{name}", text, labels, registry=self.registry)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)
