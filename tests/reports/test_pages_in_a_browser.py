"""The pages in headless Chromium: they open without errors, fit a phone, and their controls work."""

import shutil

import polars as pl
import pytest
from browser import BROWSER, drive
from made import HOSTILE, made_run, made_sweep
from made_rounds import made_rounds

from raydpo.reports import write_comparison, write_report
from raydpo.reports.explain import SHOWN, WORLD, closed_form, write_explanation

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
POINT = (
    "const at = (target, kind, x, y) => target.dispatchEvent(new w.PointerEvent(kind, {clientX: x, clientY: y, "
    "bubbles: true, pointerType: 'mouse'}));"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    place = tmp_path_factory.mktemp("pages")
    runs = [
        made_run(place, "one", steps=60, sources=("helpful", "harmless"), evaluation=True, prompt=HOSTILE),
        made_run(place, "two", beta=0.5, steps=20),
    ]
    found = {"run": write_report(str(runs[0])), "sweep": write_report(str(made_sweep(place, (0.03, 0.1, 0.3), steps=20)))}
    rounds = [
        made_rounds(
            place, "rounds-of-a-long-name", rounds=5, prompt=HOSTILE, answer=HOSTILE * 9, errors={2: f"math: {HOSTILE}"}
        ),
        made_rounds(place, "fixed", settings={"offline": True, "train.seed": 1}),
        made_rounds(place, "fixed-2", settings={"offline": True, "train.seed": 2}),
    ]
    found["rounds"] = write_report(str(rounds[0]))
    write_comparison([str(run) for run in rounds], place / "rounds-compared.html")
    for kind, page in found.items():
        shutil.copy(page, place / f"{kind}.html")
    write_comparison([str(run) for run in runs], place / "comparison.html")
    write_explanation(place / "explain.html")
    return place


@pytest.mark.parametrize(
    ("kind", "dark"),
    [
        ("run", False),
        ("sweep", True),
        ("comparison", False),
        ("explain", True),
        ("rounds", False),
        ("rounds-compared", True),
    ],
)
def test_opens_without_complaint_and_fits_a_phone(pages, kind, dark):
    found, complaints = drive(
        pages / f"{kind}.html",
        """
        const e = d.documentElement, s = w.getComputedStyle(d.body);
        const late = d.createElement("script");
        late.textContent = "window.ran = true";
        d.body.append(late);
        const wide = [...d.querySelectorAll("body *")].filter(one => one.getBoundingClientRect().right > 361
                                                              && !one.closest(".scroll")).map(one => one.tagName);
        return { content: e.scrollWidth, window: e.clientWidth, ran: w.ran === true, svgs: d.querySelectorAll("svg").length,
                 images: d.querySelectorAll("img").length, paper: s.backgroundColor, wide };
        """,
        width=360,
        dark=dark,
    )
    assert found["content"] <= found["window"] <= 360 and found["wide"] == []
    assert found["svgs"] >= 3 and found["images"] == 0
    assert found["paper"] == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    # The script that was smuggled in is refused by the page's policy, and nothing else is complained of.
    assert not found["ran"] and len(complaints) == 1 and "Content Security Policy" in complaints[0]


def test_curves_tell_their_values_to_pointer_and_keys(pages):
    found, complaints = drive(
        pages / "run.html",
        POINT
        + """
        const figure = [...d.querySelectorAll("figure")].find(one => one.querySelector("h3").textContent === "Loss");
        const svg = figure.querySelector("svg"), out = figure.querySelector("output"), told = [];
        svg.scrollIntoView();
        const place = svg.getBoundingClientRect();
        at(svg, "pointermove", place.right - 1, place.top + 40);
        told.push(out.textContent);
        at(svg, "pointerleave", 0, 0);
        told.push(out.textContent);
        for (const key of ["Home", "ArrowRight", "ArrowRight", "End", "ArrowLeft"]) {
          svg.dispatchEvent(new w.KeyboardEvent("keydown", { key }));
          told.push(out.textContent);
        }
        return told;""",
    )
    loss = pl.read_parquet(pages / "one" / "metrics.parquet")["loss"]
    held_out = pl.read_parquet(pages / "one" / "eval.parquet")["eval_loss"]

    def said(step):
        near = min(range(0, 61, 10), key=lambda other: abs(other - step))
        where = "" if near == step else f" (step {near})"
        return f"step {step}: training {loss[step - 1]:.5g} · held out {held_out[near // 10]:.5g}{where}"

    assert complaints == []
    assert found[0] == said(60) and found[1] == ""
    assert found[2].startswith("step 0: training") and found[3:] == [said(1), said(2), said(60), said(59)]


def test_tables_sort_and_marks_tell_their_trial(pages):
    found, complaints = drive(
        pages / "sweep.html",
        """
        const table = d.querySelector("table.sortable"), heads = [...table.tHead.rows[0].cells];
        const column = name => heads.findIndex(head => head.textContent.startsWith(name));
        const names = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
        const sorted = [];
        for (const name of ["accuracy", "accuracy", "train.beta", "trial"]) {
          heads[column(name)].querySelector("button").click();
          sorted.push([names(), heads[column(name)].getAttribute("aria-sort")]);
        }
        const mark = d.querySelector(".mark");
        mark.focus();
        const figure = mark.closest("figure");
        return { sorted, told: figure.querySelector("output").textContent, label: mark.getAttribute("aria-label"),
                 on: [...d.querySelectorAll("tr.on")].map(row => row.cells[0].textContent),
                 marks: d.querySelectorAll(".mark.on").length, focusable: mark.tabIndex };""",
    )
    assert complaints == []
    accuracy = {
        name: pl.read_parquet(pages / "betas" / name / "eval.parquet")["eval_rewards/accuracies"][-1]
        for name in ("beta0.03", "beta0.1", "beta0.3")
    }
    rising = sorted(accuracy, key=accuracy.get)
    (first, up), (second, down), (by_beta, _), (by_name, _) = found["sorted"]
    assert (up, down) == ("ascending", "descending")
    assert [accuracy[name] for name in first[:3]] == [accuracy[name] for name in rising]
    assert [accuracy[name] for name in second[:3]] == [accuracy[name] for name in reversed(rising)]
    assert {*first[3:]} == {*second[3:]} == {"beta3", "beta10"}  # without an accuracy, last either way
    assert by_beta == by_name == ["beta0.03", "beta0.1", "beta0.3", "beta3", "beta10"]
    assert found["told"] == found["label"] and found["told"].startswith("beta 0.3: held-out accuracy")
    assert found["on"] == ["beta0.3"] and found["marks"] == 4 and found["focusable"] == 0


def test_the_slider_shows_what_beta_does(pages):
    found, complaints = drive(
        pages / "explain.html",
        """
        const slider = d.getElementById("beta"), seen = [];
        for (const value of [slider.value, "0", "20"]) {
          slider.value = value;
          slider.dispatchEvent(new w.Event("input"));
          const shown = [...d.querySelectorAll("svg [data-frame]")].filter(
            one => w.getComputedStyle(one).display !== "none");
          seen.push({ told: d.getElementById("told").textContent, aria: slider.getAttribute("aria-valuetext"),
                      policy: [...d.querySelectorAll("[data-answer]")].map(cell => Number(cell.textContent)),
                      frames: shown.map(one => one.dataset.frame) });
        }
        const formulas = [...d.querySelectorAll("math[display=block]")];
        return { seen, strokes: d.querySelectorAll(".gone").length,
                 heights: formulas.map(one => one.getBoundingClientRect().height) };""",
    )
    assert complaints == []
    for seen, beta, frame in zip(found["seen"], (1.0, 0.1, 10.0), (SHOWN, 0, 20), strict=True):
        assert seen["told"].startswith(f"beta {beta:g}: expected reward ") and seen["aria"] == f"beta {beta:g}"
        assert seen["policy"] == pytest.approx(closed_form(WORLD, beta), abs=0.0051)
        assert seen["frames"] == [str(frame)] * 5
    assert found["strokes"] == 2 and min(found["heights"]) > 20


def test_rounds_tell_their_values_to_pointer_and_keys(pages):
    found, complaints = drive(
        pages / "rounds.html",
        """
        const figure = [...d.querySelectorAll("figure")].find(one => one.querySelector("h3").textContent === "Success");
        const svg = figure.querySelector("svg"), told = [];
        svg.dispatchEvent(new w.KeyboardEvent("keydown", { key: "Home" }));
        svg.dispatchEvent(new w.KeyboardEvent("keydown", { key: "ArrowRight" }));
        told.push(figure.querySelector("output").textContent);
        const mark = d.querySelector(".mark[data-mark=round-2]");
        mark.focus();
        told.push(mark.closest("figure").querySelector("output").textContent);
        return told;""",
    )
    assert complaints == []
    assert found[0] == (
        "round 1: held out 0.4 ± 0.031 · training answers 0.2 · held out, greedy 0.45 · held out, any of 4 0.7"
    )
    assert found[1] == "round 2: success 0.600 ± 0.032, drift 1.40 ± 0.10 nats an answer"
