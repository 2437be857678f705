"""`GET /metrics` for Prometheus: what the gateway counted, how deployments and GPUs are, and what the engines tell."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import nimhost
from nimhost.api.parts import Parts
from nimhost.gateway.metrics import Histogram, Series
from nimhost.gateway.proxy import Gateway
from nimhost.gateway.scrape import Scrape
from nimhost.gateway.traffic import Traffic
from nimhost.refs import Ref

Json = dict[str, Any]
WAY = ("model", "provider", "adapter")
COUNTED = {
    "prompt_tokens": "Tokens of requests, where the reply told.",
    "completion_tokens": "Tokens of replies, where the reply told.",
}
TIMED = {
    "first_byte_s": (
        "time_to_first_byte_seconds",
        "From the request's begin to the first byte of the upstream's reply.",
    ),
    "duration_s": ("request_duration_seconds", "From a request's begin to the last byte of its reply."),
    "overhead_s": ("overhead_seconds", "How long a request was with nimhost itself before its reply began."),
    "tokens_per_s": ("output_tokens_per_second", "How fast the tokens of a reply came, where the reply told how many."),
}


def routes(parts: Parts) -> list[Route]:
    async def answer(request: Request) -> Response:
        text = await exposition(parts.gateway, parts.host.readings()) if parts.gateway else b""
        return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return [Route("/metrics", answer, methods=["GET"])]


async def exposition(gateway: Gateway, readings: Json) -> bytes:
    """`readings`: see `HostView.readings`."""
    engines = await gateway.engine_metrics()
    # In a thread: a hundred ways take 80 ms, and requests must not wait for that.
    return await asyncio.to_thread(_render, gateway.traffic, readings, engines)


def _render(traffic: Traffic, readings: Json, engines: Scrape) -> bytes:
    own = [*of_gateway(traffic), *of_host(readings), _of_engines(engines.up)]
    return generate_latest(_Collected(own)) + engines.text.encode()


class _Collected:
    """What `generate_latest` takes for a registry."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def of_gateway(traffic: Traffic) -> Iterator[Metric]:
    ways = traffic.metrics.all()
    requests = CounterMetricFamily(
        "nimhost_gateway_requests", "Requests, by the status of the reply.", labels=(*WAY, "status")
    )
    errors = CounterMetricFamily(
        "nimhost_gateway_errors", "Requests that failed, by what failed.", labels=(*WAY, "kind")
    )
    under_way = GaugeMetricFamily(
        "nimhost_gateway_requests_in_flight", "Requests that are with an upstream.", labels=WAY
    )
    for way in ways:
        for status, count in dict(way.requests).items():
            requests.add_metric((*way.labels, str(status)), count)
        for kind, count in dict(way.errors).items():
            errors.add_metric((*way.labels, kind), count)
        under_way.add_metric(way.labels, way.in_flight)
    yield from (requests, errors, under_way)
    for what, said in COUNTED.items():
        tokens = CounterMetricFamily(f"nimhost_gateway_{what}", said, labels=WAY)
        for way in ways:
            tokens.add_metric(way.labels, getattr(way, what))
        yield tokens
    for what, (name, said) in TIMED.items():
        yield _histogram(f"nimhost_gateway_{name}", said, ways, what)
    yield CounterMetricFamily(
        "nimhost_gateway_request_log_dropped", "Requests that the log has forgotten.", value=traffic.log.dropped
    )


def _histogram(name: str, said: str, ways: Sequence[Series], what: str) -> Metric:
    family = HistogramMetricFamily(name, said, labels=WAY)
    for way in ways:
        found: Histogram = getattr(way, what)
        family.add_metric(way.labels, found.buckets(), found.total)
    return family


def of_host(readings: Json) -> Iterator[Metric]:
    yield InfoMetricFamily("nimhost", "The version that runs.", value={"version": nimhost.__version__})
    deployments = GaugeMetricFamily("nimhost_deployments", "Deployments, by their status.", labels=("status",))
    for status, count in readings["deployments"].items():
        deployments.add_metric((status,), count)
    yield deployments
    for key, said in (("memory_bytes", "Memory of a GPU."), ("used_bytes", "Memory of a GPU that is in use.")):
        family = GaugeMetricFamily(f"nimhost_gpu_{key}", said, labels=("gpu", "uuid", "name"))
        for gpu in readings["gpus"]:
            family.add_metric((str(gpu["index"]), gpu["uuid"], gpu["name"]), gpu[key])
        yield family


def _of_engines(up: dict[Ref, bool]) -> Metric:
    said = "Whether the engine of a deployment told its own metrics."
    family = GaugeMetricFamily("nimhost_engine_metrics_up", said, labels=("workspace", "deployment"))
    for ref, told in up.items():
        family.add_metric(ref, int(told))
    return family
