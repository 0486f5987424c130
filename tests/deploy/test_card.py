"""A model card says what is known, says what is not, and takes nothing of it for markup."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from fedkit.deploy import card
from fedkit.deploy.plots import plots
from fedkit.deploy.verify import FP32, MODELS
from tests.deploy.conftest import CURVES, facts, passport_of

SIZES = {"model.onnx": 10_184, "model.int8.onnx": 7_892}
SECTIONS = [
    "In short",
    "The model",
    "Inputs and outputs",
    "How it was trained",
    "Data, and who took part",
    "Scores",
    "Fairness across clients and groups",
    "Privacy",
    "Quantisation",
    "Limits, and what this card does not say",
    "How to run it",
    "How to verify it",
]


def written(values: dict[str, Any], pictures: tuple[str, ...] = ()) -> str:
    passport = passport_of(values)
    sizes = {name: size for name, size in SIZES.items() if name in (FP32, MODELS[passport.shipped])}
    return card.text(passport, "ab" * 32, sizes, pictures)


def bare() -> dict[str, Any]:
    """A passport of a run of which next to nothing is known."""
    values = facts("fp32")
    clients = [{"pseudonym": "site-1", "rounds": 3}, {"pseudonym": "site-2", "rounds": 2}]
    values |= {"clients": clients, "test": {}, "gate": [], "calibration": None, "examined": None, "versions": {}}
    values["run"] |= {"engine": "simulation", "best": False}
    values["task"] |= {"source": None, "metrics": []}
    return values | {"privacy": {"aggregation": "plain"}}


def test_a_card_has_its_sections_and_the_figures_of_the_passport() -> None:
    text = written(facts(), ("learning.png",))
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == SECTIONS
    for part in ("0.8312", "site-2046fcaffc", "97.10%", "`auroc>=0.8` | 3 of 4", "epsilon 2.410", "a gap of 0.1700"):
        assert part in text
    assert "![learning](learning.png)" in text
    assert "clients.png" not in text
    assert f"fedkit verify FOLDER --signer {'ab' * 32}" in text
    assert "1 of 4 clients do not release their own score" in text


def test_what_is_missing_is_said_to_be_missing() -> None:
    text = written(bare())
    for part in (
        "| `site-1` | 3 | not known | not known |",
        "its code is not on record",
        "No scores by round were given",
        "The shipped file itself was not examined",
        "2 of 2 clients do not release their own score",
        "Scores by groups of rows were not asked for",
        "no noise was added",
        "No ranges were calibrated",
        "Versions: not known",
        "simulated on one machine",
    ):
        assert part in text
    assert plots(passport_of(bare()), {"loss": {1: None}}) == {}
    unknown = facts()
    unknown["clients"] = [{"pseudonym": "site-1", "rounds": 3}]
    assert "what it has cost each client is not known here" in written(unknown)


def test_words_of_a_passport_are_text_and_never_markup() -> None:
    values = facts()
    values["gate"][0]["why"] = "<script>alert(1)</script> | [here](http://x) `code`\n# head"
    values["run"]["strategy"] = "Fed`Avg | x"
    text = written(values)
    assert "<script>" not in text
    assert "[here](" not in text
    assert "\n# head" not in text
    rows = [line for line in text.splitlines() if line.startswith("| fp32 ")]
    assert [row.replace("\\|", "").count("|") for row in rows] == [11]


def test_a_thousand_clients_fit_on_a_card() -> None:
    values = facts()
    scores = [{"pseudonym": f"site-{i}", "rounds": 1, "test": {"auroc": i / 1000}} for i in range(1000)]
    text = written(values | {"clients": scores})
    assert "And 950 more, in `passport.json`" in text
    assert text.count("| `site-") == 50


@pytest.mark.parametrize("count", [1, 4, 500])
def test_pictures_are_png_files_of_a_size_that_fits_a_page(count: int) -> None:
    values = facts()
    scores = [{"pseudonym": f"site-{i}", "rounds": 1, "test": {"auroc": i / count}} for i in range(count)]
    found = plots(passport_of(values | {"clients": scores}), CURVES if count == 4 else {})
    assert set(found) == {"clients.png", "variants.png"} | ({"learning.png"} if count == 4 else set())
    for content in found.values():
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            assert 400 < image.width < 1500
            assert 300 < image.height < 700
