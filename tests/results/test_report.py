"""Pages, as a parser of HTML reads them."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import re
from pathlib import Path

import pytest

from grood_cert.results import card as cards
from grood_cert.results import report
from grood_cert.results.card import Result
from grood_cert.results.curves import fpr_curve
from tests.results.examples import random_certification
from tests.results.test_card import MANIFEST, named
from tests.results.test_sweeps import run

HOSTILE = "<script>alert(1)</script>\"' onload=x & {{ 7 * 7 }}"


class Page(html.parser.HTMLParser):
    """What stands in a page."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page_of(detectors, title="A title"):
    return Page(report.page(cards.card(detectors, title), report.pictures(detectors)))


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return {
        name: [Result(folder / name / "rows.csv", named(random_certification(seed), name, name, **MANIFEST))]
        for seed, name in enumerate(("one", "two"))
    }


def test_the_page_is_whole_and_loads_nothing(detectors):
    page = page_of(detectors)
    assert page.tags.count("html") == page.tags.count("main") == page.tags.count("h1") == 1
    assert not {"script", "link", "iframe", "object", "embed", "form", "base", "a"} & set(page.tags)
    assert all(value.startswith("data:image/svg+xml;base64,") for _, name, value in page.attributes if name == "src")
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("href", "srcset", "action")]
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    drawing = base64.b64decode(pictures[0].partition(",")[2]).decode()
    assert drawing.startswith("<?xml") and "<script" not in drawing and not re.search(r'href="(?!#)', drawing)
    assert all(value for tag, name, value in page.attributes if (tag, name) == ("img", "alt"))


def test_whatever_comes_from_data_is_escaped():
    table = random_certification(0, kinds=(("id", HOSTILE + "in"), ("ood", HOSTILE + "out")))
    data = [{"set": HOSTILE + "in", "kind": "id", "images": 99, "sha256": HOSTILE, "note": HOSTILE}]
    table = named(table, HOSTILE, HOSTILE, **MANIFEST, data=data, command=HOSTILE, failures={HOSTILE: 1})
    table = dataclasses.replace(table, manifest={**table.manifest, "versions": {HOSTILE: HOSTILE}})
    page = page_of({HOSTILE: [Result(Path(HOSTILE), table)]}, HOSTILE)
    assert "script" not in page.tags and not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) > 10 and "49" not in page.text


def test_the_words_say_what_the_card_says(detectors):
    page = page_of(detectors)
    for name, group in detectors.items():
        for record in fpr_curve(group[0].table).sets:
            if record["eps"] == 0.2:
                certified, attacked = record["fpr95_id_certified"], record["fpr95_id_attacked"]
                said = (
                    rf"{name} , {record['set']} moved by up to 0.2 \(l_inf\): at most {report.percent(certified)} pass"
                )
                assert re.search(said, page.text), said
                assert f"at least {report.percent(attacked)} do (shown)" in page.text
    assert page.text.count("Not finished") == 0
    assert {"form proved", "form shown", "form estimate"} <= {
        value for _, name, value in page.attributes if name == "class"
    }


def test_detectors_that_cannot_share_a_figure_get_their_own(detectors):
    other = named(random_certification(2), "three", "three", **MANIFEST, norm="l2")
    drawn = report.pictures({**detectors, "three": [Result(detectors["one"][0].path, other)]})
    assert [picture.title.rpartition(" (")[2] for picture in drawn] == ["l_inf): one, two", "l_2): three"]
    inside = named(random_certification(2, kinds=(("id", "in"),)), "four", "four", **MANIFEST)
    assert report.pictures({"four": [Result(detectors["one"][0].path, inside)]}) == []  # no OOD, no figure
    assert "Certification: l_inf" in page_of({"four": [Result(detectors["one"][0].path, inside)]}).text


def swept(tmp_path):
    """Certifications and analyses of two lambda_grad times two seeds, and one detector more."""
    found = {}
    for weight, seed in ((0.0, 0), (0.0, 1), (0.5, 0), (0.5, 1)):
        name = f"lambda_grad={weight:g}-seed={seed}"
        for table in run(weight, seed):
            recipe = {"name": name, **table.manifest["recipe"]}
            made = named(table, name, name, **MANIFEST, recipe=recipe, command="grood-cert sweep x --out y")
            found.setdefault(name, []).append(Result(tmp_path / name / f"{table.kind}.csv", made))
    return found


def test_seeds_are_told_together(detectors, tmp_path):
    runs = {**swept(tmp_path), "one": detectors["one"]}
    content = cards.card(runs, "A title")
    assert [(group["name"], group["seeds"]) for group in content["groups"]] == [
        *((f"lambda_grad={weight}", [0, 1]) for weight in ("0", "0.5")),
        ("one", [None]),
    ]
    tables = [group[0].table for group in runs.values()][:2]
    (told,) = [record for record in content["groups"][0]["fpr95_id"] if (record["set"], record["eps"]) == ("a", 0.2)]
    for key in ("certified", "attacked"):
        each = [getattr(fpr_curve(table, "ood", {"a": table.sets("ood")["a"]}), key)[2] for table in tables]
        value = told[f"fpr95_id_{key}"]
        assert (value["mean"], value["least"], value["most"]) == (sum(each) / 2, min(each), max(each))
    assert content["groups"][0]["over_seeds"]["in"]["accuracy"]["mean"] == pytest.approx(0.905)
    drawn = report.pictures(runs)
    assert [picture.title.split(":")[0] for picture in drawn] == [
        "False positives as OOD is moved by up to eps (l_inf)",
        "ID that stays accepted within eps (l_inf)",
        "OOD that stays rejected within eps (l_inf)",
        "ID that stays accepted against false positives, as the threshold gamma moves (l_inf)",
        "Local Lipschitz constant of S (l_inf)",
        "From the objective to the proof",
    ]
    assert drawn[0].title.endswith(": lambda_grad=0, lambda_grad=0.5, one")
    assert drawn[-1].command == "grood-cert sweep x --out y"
    page = Page(report.page(content, drawn))
    assert "lambda_grad=0 (2 seeds), a moved by up to 0.2 (l_inf): at most" in page.text
    assert "no intervals over the sampling of images" in page.text and "one , a moved by up to 0.2" in page.text
    assert page.text.count("seeds), a moved") == 2


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.5, "50 %"), (0.012, "1.2 %"), (0.998, "99.8 %"), (1 / 3, "33 %")],
)
def test_shares_near_the_ends_keep_a_digit(share, words):
    assert report.percent(share) == words


@pytest.mark.parametrize(
    ("eps", "shown"),
    [((0.1,), [0.1]), ((0.0, 0.1, 0.2), [0.1, 0.2]), ((0.01, 0.02, 0.03, 0.05, 0.1), [0.02, 0.03, 0.05])],
)
def test_a_few_eps_are_shown(eps, shown):
    assert report.shown_eps(eps) == shown
