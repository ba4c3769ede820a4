"""grafana.json is valid PromQL over gauges that raydpo exports."""

import json
import re
from pathlib import Path

import promql_parser
import pytest

from raydpo.rundir.trackers import GAUGES, Gauges

DASHBOARD = json.loads((Path(__file__).parents[2] / "cluster" / "grafana.json").read_text())
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
VARIABLES = {"run": "all", "__range": "6h"} | {
    one["name"]: one["current"]["value"] for one in DASHBOARD["templating"]["list"] if one["type"] == "textbox"
}


@pytest.fixture(scope="module")
def exported():
    """Names of all gauges that ``Gauges`` exports, with Ray's prefix."""
    names = []

    class Recorder:
        def __init__(self, name, **_):
            names.append(f"ray_{name}")

        def set(self, value, tags):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.util.metrics.Gauge", Recorder)
        row = dict.fromkeys((*GAUGES, "not/a/gauge", "eval_loss", "eval_rewards/accuracies"), 0.0)
        Gauges("run", asked=False).log(1, row)
    return set(names)


def selectors(expression):
    """Metric names of a parsed expression."""
    found = re.findall(r"\bray_\w+", expression.prettify())
    assert found
    return found


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS, ids=[title for title, _ in EXPRESSIONS])
def test_a_panel_shows_what_is_exported(title, expression, exported):
    filled = re.sub(r"\$(\w+)", lambda match: VARIABLES[match[1]], expression)
    assert set(selectors(promql_parser.parse(filled))) <= exported
    assert 'run=~"$run"' in expression


def test_a_gauge_that_is_not_one_is_not_exported(exported):
    assert "ray_raydpo_not_a_gauge" not in exported and "ray_raydpo_step" in exported


def test_the_dashboard_has_what_a_run_is_judged_by():
    shown = " ".join(expression for _, expression in EXPRESSIONS)
    for name in ("pairs_per_second", "tokens_per_second", "cache_hits", "rewards_margins", "began_seconds", "peak_teraf"):
        assert name in shown


def test_panels_do_not_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
