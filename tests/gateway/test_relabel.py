"""Engines' metrics in one text that Prometheus accepts, whatever the engines say."""

from __future__ import annotations

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nimhost.gateway.relabel import MOST_SAMPLES, Labels, merge

A: Labels = (("workspace", "default"), ("deployment", "a"))
B: Labels = (("workspace", "default"), ("deployment", "b"))
VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="q"} 1.0
# HELP vllm:ttft_seconds Histogram of time to first token.
# TYPE vllm:ttft_seconds histogram
vllm:ttft_seconds_bucket{le="0.001",model_name="q"} 0.0
vllm:ttft_seconds_bucket{le="+Inf",model_name="q"} 3.0
vllm:ttft_seconds_sum{model_name="q"} 0.5
vllm:ttft_seconds_count{model_name="q"} 3.0
# TYPE vllm:tokens counter
vllm:tokens_total 7.0
"""


def samples(text: str) -> dict[tuple[str, str], float]:
    """(name, deployment) -> value, of the samples with the smallest labels first."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["workspace"] == "default"
            found[sample.name, sample.labels["deployment"]] = sample.value
    return found


def test_two_engines_of_a_kind_share_the_description_of_a_family() -> None:
    text = merge([(A, VLLM), (B, VLLM.replace("1.0\n", "5.0\n", 1))])
    for about in (
        "# HELP vllm:num_requests_running ",
        "# TYPE vllm:num_requests_running ",
        "# TYPE vllm:ttft_seconds ",
    ):
        assert text.count(about) == 1
    found = samples(text)
    assert found["vllm:num_requests_running", "a"] == 1.0
    assert found["vllm:num_requests_running", "b"] == 5.0
    assert found["vllm:ttft_seconds_count", "b"] == 3.0
    assert found["vllm:tokens_total", "a"] == 7.0


def test_samples_of_a_family_stand_together() -> None:
    names = [line.partition("{")[0] for line in merge([(A, VLLM), (B, VLLM)]).splitlines() if line[0] != "#"]
    begun = list(dict.fromkeys(names))
    assert begun.index("vllm:num_requests_running") == 0
    assert names.index("vllm:ttft_seconds_bucket") == names.count("vllm:num_requests_running")


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ('x{workspace="w"} 1', 'x{workspace="default",deployment="a",exported_workspace="w"} 1'),
        ('x{a="1", deployment="d"} 1', 'x{workspace="default",deployment="a",a="1",exported_deployment="d"} 1'),
        ('x{my_workspace="w"} 1', 'x{workspace="default",deployment="a",my_workspace="w"} 1'),
        ('x{a="}",} NaN', 'x{workspace="default",deployment="a",a="}"} NaN'),
        ("x +Inf 1700000000000", 'x{workspace="default",deployment="a"} +Inf'),
        ('x{a=",workspace=1"} 1', 'x{workspace="default",deployment="a",a=",workspace=1"} 1'),
        ('x{a="u\u2028v\\\\\\n\\""} .5', 'x{workspace="default",deployment="a",a="u\u2028v\\\\\\n\\""} .5'),
        ("x 1\r", 'x{workspace="default",deployment="a"} 1'),
        ("x 1e-05", 'x{workspace="default",deployment="a"} 1e-05'),
    ],
)
def test_a_sample_says_whose_it_is(said: str, wanted: str) -> None:
    assert merge([(A, f"{said}\n")]).split("\n")[-2] == wanted


@pytest.mark.parametrize(
    "said",
    ["<html>not found</html>", "x", "x one", 'x{a="1" 1', "# TYPE x", "nimhost_gateway_requests_total 9", "\x00",
     "x{bad} 1", 'x{a="1" b="2"} 1', "x{a=1} 1", 'x{1a="1"} 1', 'x{a="1",,b="2"} 1', 'x{a="\\q"} 1', "x 1.2.3", "x -",
     "x e", "x +-1", "x \u0663", 'x{a="1",a="2"} 1', 'x{workspace="1",exported_workspace="2"} 1', 'x{a="1"} 1\x0b'],
)  # fmt: skip
def test_what_is_no_sample_or_pretends_to_be_ours_is_left_out(said: str) -> None:
    """A scraper would drop everything for one of these."""
    assert merge([(A, f"{said}\ny 1")]) == '# TYPE y untyped\ny{workspace="default",deployment="a"} 1\n'


def test_an_unknown_type_does_not_spoil_the_scrape() -> None:
    assert "# TYPE x untyped\n" in merge([(A, "# TYPE x stateset\nx 1")])


def test_an_engine_that_tells_without_end_is_cut_off() -> None:
    assert merge([(A, "\n".join(f'x{{n="{n}"}} 1' for n in range(MOST_SAMPLES + 5)))]).count("\n") == MOST_SAMPLES + 1


@pytest.mark.parametrize(
    ("begin", "again", "end"),
    [("x ", "1", "y"), ('x{a="1"', " ", "1"), ("x{", " ", "1"), ('x{a="1",', " ", "1"), ('x{a="', "\\n", "1"),
     ('x{a="1"', ',a="1"', "1"), ("x 1", " ", "y"), ("x 1 1", " ", "y"), ("x", " ", "y")],
)  # fmt: skip
def test_a_line_of_a_megabyte_is_soon_seen_to_be_no_sample(begin: str, again: str, end: str) -> None:
    """Nobody else has a turn while it is looked at."""
    begun = time.thread_time()
    assert merge([(A, f"{begin}{again * (1_000_000 // len(again))}{end}")]) == ""
    assert time.thread_time() - begun < 1
