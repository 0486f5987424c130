"""The page of a run: what it says, that nothing gets into it or out of it, and that everybody can use it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import fedkit
from fedkit.cli import app
from fedkit.config import DP, Privacy
from fedkit.errors import ConfigError, Reason, StorageError, TrustError
from fedkit.report.facts import Facts, Handed, handed, read
from fedkit.report.page import index, page, policy, write
from fedkit.report.scale import amount, axis, duration, spans, thinned
from fedkit.rounds.call import Refusal
from fedkit.rounds.shield import EVERY_CLIENT
from fedkit.status import RunStatus
from fedkit.strategies import FedAvg
from fedkit.testing import toy_task
from tests.deploy.bundles import SIGNER, small_bundle
from tests.deploy.passports import passport
from tests.report.reader import Element, parsed
from tests.report.runs import CLIENTS, facts, record

TO = "\N{EN DASH}"
SCRIPT = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
STYLE = (Path(sys.modules[page.__module__].__file__).parent / "page.css").read_text()


def section(html: str, name: str) -> Element:
    return parsed(html).one("section", id=name)


def table(part: Element, caption: str) -> list[list[str]]:
    return next(one for one in part.all("table") if one.one("caption").text.startswith(caption)).rows()


# -- what it says ------------------------------------------------------------------------------------------------------


def test_a_page_is_made_of_what_a_simulation_saved(tmp_path: Path) -> None:
    fit = fedkit.Fit(steps=2, batch_size=8, lr=0.1)
    strategy, rule = FedAvg(rounds=3, local=fit), fedkit.Evaluation(best="loss:min")
    result = fedkit.simulate(toy_task(), strategy, clients=CLIENTS, seed=1, evaluate=rule, threads=1)
    found = read(result.save(tmp_path / "run"))
    assert list(found.history) == result.history
    assert found.privacy == result.privacy
    html = write(tmp_path / "run.html", found).read_text()
    rows = table(section(html, "scores"), "Loss on validation data")
    assert rows[0] == ["Round", "all clients", *CLIENTS]
    assert [float(row[1]) for row in rows[1:]] == pytest.approx([r.metrics["loss"] for r in result.history], rel=1e-3)
    assert table(section(html, "clients"), "Contributions") == [
        ["Client", "Contributed to", "Rounds", "Refused in rounds"],
        *([name, "3", f"1{TO}3", "none"] for name in CLIENTS),
    ]


def test_time_and_bytes_are_those_on_record_abandoned_attempts_included() -> None:
    html = page(facts())
    assert table(section(html, "time"), "Wall time")[1:] == [
        ["rounds that stand", "3", "8 s"],
        ["rounds that were rejected", "1", "2 s"],
        ["attempts that fell below the quorum", "1", "1.5 s"],
    ]
    assert table(section(html, "bytes"), "Payload")[1:] == [["down, to clients", "5 kB"], ["up, from clients", "15 kB"]]


def test_refusals_are_there_with_reason_and_words() -> None:
    part = section(page(facts()), "refusals")
    assert table(part, "Refusals by reason")[1:] == [["deadline", "2"], ["policy", "1"]]
    assert table(part, "Each refusal")[1:] == [
        ["round 2", "cyd", "deadline", "no answer within 2 s"],
        ["round 4, attempt 1", "cyd", "deadline", "no answer within 2 s"],
        ["test scores", "bea", "policy", "scores stay here"],
    ]
    assert "Nobody refused" in section(page(facts(history=(record(1),), abandoned=(), refusals=())), "refusals").text


def test_a_refused_client_is_crossed_out_in_its_column_of_the_matrix() -> None:
    chart = section(page(facts()), "clients").one("svg")
    crosses = [one for one in chart.all("path") if one.attributes["class"] == "cross"]
    assert len(crosses) == 1
    filled = [one.attributes["d"].count("M") for one in chart.all("path") if one.attributes["class"] == "part4"]
    assert filled == [4, 4, 3]


def test_epsilon_by_round_stands_against_what_was_planned() -> None:
    part = section(page(facts()), "privacy")
    assert table(part, "Epsilon")[2:] == [
        ["2", "0.5", "0.5", "0.25"],
        ["3", "0.75", "0.75", "0.75"],
        ["4", "1", "1", "1"],
    ]
    assert "planned 3" in part.one("svg").text
    assert parsed(page(facts())).one("dl", **{"class": "tiles"}).text.count("1 of 3") == 1
    alike = facts(history=(record(1, epsilon={EVERY_CLIENT: 0.12345}),))
    assert table(section(page(alike), "privacy"), "Epsilon") == [["Round", EVERY_CLIENT], ["1", "0.124"]]


@pytest.mark.parametrize(
    ("privacy", "text"),
    [
        (None, "not known here until it has ended"),
        (Privacy(), "No noise was added"),
        (Privacy(aggregation="masked", dp=DP(noise_multiplier=1.0, delta=1e-4)), "What it has cost each client is not"),
    ],
)
def test_what_is_not_known_of_privacy_is_said_to_be_so(privacy: Privacy | None, text: str) -> None:
    quiet = facts(privacy=privacy, history=(record(1, epsilon={}),), abandoned=())
    assert text in section(page(quiet), "privacy").text


def test_a_round_that_does_not_stand_says_why() -> None:
    rows = table(section(page(facts()), "scores"), "Rounds that do not stand")
    assert rows[1:] == [["3", "accuracy is 0.1 after 0.7"]]


def test_a_run_that_has_just_begun_has_a_page() -> None:
    begun = facts(history=(), abandoned=(), test={}, test_per_client={}, refusals=(), best=None, state="waiting")
    html = page(begun, live=True)
    assert "No round is committed yet." in section(html, "scores").text
    assert "Waiting, round 0 of 4." in parsed(html).one("main").text


def test_scores_that_are_no_numbers_leave_a_gap_and_nothing_else() -> None:
    odd = [record(at, metrics={"loss": value}) for at, value in enumerate((0.5, math.nan, math.inf, 1e305, 0.25), 1)]
    part = section(page(facts(history=tuple(odd))), "scores")
    pooled = [one for one in part.all("path") if one.attributes["class"] == "line pooled" and one.all("title")]
    assert [one.attributes["d"].count("M") for one in pooled] == [1, 2]
    assert "nan" not in "".join(one.attributes["d"] for one in part.all("path"))
    assert [row[1] for row in table(part, "Loss on validation")[1:]] == ["0.5", "nan", "inf", "1e+305", "0.25"]


# -- the hand-over -----------------------------------------------------------------------------------------------------


def test_the_gate_and_parity_of_a_bundle_are_shown_once_its_signature_holds(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "bundle", 0.5)
    run = facts()
    found = handed(bundle, run)
    assert found.signer == SIGNER
    text = section(page(run, found), "handover")
    assert "1.0e-07 from PyTorch, 1e-05 is allowed: it holds" in text.text
    assert [row[:2] for row in table(text, "The gate")[1:]] == [["fp32", "passed"], ["int8", "passed"]]
    assert ["accuracy>=0.7", "3 of 4"] in table(text, "Criteria")
    (bundle / "passport.json").write_text((bundle / "passport.json").read_text().replace("0.8", "0.9"))
    with pytest.raises(TrustError, match="changed after it was signed"):
        handed(bundle, run)


def test_a_bundle_of_another_run_is_refused(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "bundle", 0.5)
    with pytest.raises(ConfigError, match=r"bundle of heart-1 .*, not of heart-2 .*--bundle"):
        handed(bundle, facts(name="heart-2"))


# -- nothing gets in, nothing gets out ---------------------------------------------------------------------------------


def hostile(text: str) -> str:
    """A page in which everything that comes from others is `text`."""
    bad = Refusal(text, Reason.FAILED, text)
    line = record(1, (text,), refusals=(bad,), rejected=text, metrics={text: 0.5})
    run = facts(
        name=text,
        task=text,
        clients=(text,),
        history=(line,),
        strategy={"name": text, text: text},
        refusals=(bad,),
        test={text: 1.0},
        detail=text,
        test_per_client={text: {text: 1.0}},
        evaluate=None,
    )
    measured = passport().gate[0].replace(why=text, valid={text: 0.5})
    stamped = passport(gate=[measured], created=text)
    return page(run, Handed(stamped, text))


def test_text_from_elsewhere_stays_text() -> None:
    html = hostile(SCRIPT)
    found = parsed(html)
    assert len(found.all("script")) == 1
    assert found.all("img") == []
    assert not any(name.startswith("on") for one in found.all() for name in one.attributes)
    assert found.one("h1").text == f"Run {SCRIPT}"
    assert SCRIPT in section(html, "refusals").text


@given(st.text(min_size=1, max_size=40))
def test_no_text_changes_the_elements_of_a_page(text: str) -> None:
    html = hostile(text)
    html.encode()
    assert sorted(one.name for one in parsed(html).all()) == PLAIN


PLAIN = sorted(one.name for one in parsed(hostile("plain")).all())


def test_characters_that_turn_the_line_or_are_none_are_replaced() -> None:
    text = section(hostile("a\u202eb\x00c\ud800d"), "refusals").text
    assert "a\ufffdb\ufffdc\ufffdd" in text
    long = section(page(facts(refusals=(Refusal("a", Reason.FAILED, "x" * 10_000),))), "refusals").text
    assert "x" * 400 + "…" in long
    assert "x" * 401 not in long


@pytest.mark.parametrize("live", [False, True])
def test_the_page_asks_nobody_for_anything(live: bool) -> None:
    html = page(facts(state="running"), live=live)
    found = parsed(html)
    [rules] = [
        one.attributes["content"]
        for one in found.all("meta")
        if one.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert rules == policy(live=live)
    assert rules.startswith("default-src 'none'; ")
    assert f"connect-src '{'self' if live else 'none'}'" in rules
    assert "unsafe" not in rules
    links = [one.attributes[name] for one in found.all() for name in ("href", "src") if name in one.attributes]
    assert all(link.startswith("#") or (live and link == "/runs") for link in links)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", html)
    assert not any("style" in one.attributes for one in found.all())
    for name in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(found.one(name).text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in rules


def test_only_a_live_page_of_a_run_that_goes_on_looks_again() -> None:
    goes_on, over = facts(state="running"), facts()
    looks = [page(goes_on, live=True), page(goes_on), page(over, live=True)]
    assert ["data-live" in parsed(html).one("main").attributes for html in looks] == [True, False, False]
    assert ['http-equiv="refresh"' in html for html in looks] == [True, False, False]


# -- everybody can use it ----------------------------------------------------------------------------------------------


def test_headings_labels_and_tables_are_in_order() -> None:
    found = parsed(page(facts()))
    assert found.one("html").attributes["lang"] == "en"
    assert [one.name for one in found.all("h1", "h2", "h3")] == ["h1", *["h2"] * 9]
    assert [one.attributes["href"][1:] for one in found.one("nav").all("a")] == [
        one.attributes["id"] for one in found.all("section")
    ]
    for chart in (one for one in found.all("svg") if one.attributes.get("class") == "chart"):
        assert chart.attributes["role"] == "img"
        assert chart.attributes["aria-label"].endswith((".", "says the same."))
    for figure in found.all("figure"):
        assert figure.one("figcaption").text
        assert figure.one("details").one("table").rows()
    for one in found.all("table"):
        assert one.one("caption").text
        assert all(head.attributes["scope"] in ("col", "row") for head in one.all("th"))
    assert all(one.attributes["tabindex"] == "0" for one in found.all() if one.attributes.get("role") == "region")


def _palettes() -> list[dict[str, str]]:
    found = re.findall(r"\{([^{}]*--ground:[^}]*)\}", STYLE)
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in found]


def _light(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((_light(one), _light(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_from_the_ground_in_light_and_in_dark() -> None:
    light, dark, chosen = _palettes()
    assert dark == chosen
    for colours in (light, dark):
        for text in ("ink", "soft", "link"):
            assert min(contrast(colours[text], colours[under]) for under in ("ground", "panel")) >= 4.5, text
        for line in ("pooled", "cross", "part", *(f"s{at}" for at in range(8))):
            assert contrast(colours[line], colours["ground"]) >= 3.0, line
        assert contrast(colours["cross"], colours["none"]) >= 3.0


# -- size --------------------------------------------------------------------------------------------------------------


def test_a_long_run_of_many_clients_still_has_a_page_of_bounded_size() -> None:
    names = tuple(f"site-{at:03}" for at in range(60))
    many = tuple(record(at, names[at % 3 :]) for at in range(1, 601))
    html = page(facts(clients=names, history=many, abandoned=(), test_per_client={}, refusals=()))
    assert len(html) < 1_200_000
    found = parsed(html)
    assert "Of 60 clients, the first 50 by name are shown." in found.text
    assert "Of 600 rounds, one in 3 is shown" in found.text
    rows = table(found.one("section", id="scores"), "Loss on validation data")
    assert [int(row[0]) for row in rows[1:]] == list(range(3, 601, 3))
    assert "one column a span of 5 rounds" in found.one("section", id="clients").text
    assert table(found.one("section", id="clients"), "Contributions")[1][:2] == ["site-000", "200"]


# -- the list of runs --------------------------------------------------------------------------------------------------


def test_the_list_leads_to_each_run() -> None:
    run = RunStatus("heart-1", "heart", "FedAvg", "running", 3, 15, 1, "", 0.0, 0.0, None, ())
    [link] = parsed(index([run])).one("main").all("a")
    assert (link.text, link.attributes["href"]) == ("heart-1", "/runs/heart-1")
    assert "running, round 3 of 15" in parsed(index([run])).text
    assert "No run was begun yet." in parsed(index([])).text


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "{" * 100_000, '{"name": 1}', "\udcff", None],
    ids=["empty", "list", "bare", "deep", "fields", "bytes", "missing"],
)
def test_a_folder_without_a_run_says_what_it_should_be(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "run.json"))):
        read(tmp_path)


def _saved(run: Facts) -> dict[str, Any]:
    of_now = ("state", "detail", "rounds")  # of a run that may not be over: not saved
    return {name: value for name, value in json.loads(json.dumps(run.to_dict())).items() if name not in of_now}


def test_a_run_file_with_a_field_of_another_kind_is_refused(tmp_path: Path) -> None:
    good = _saved(facts())
    (tmp_path / "run.json").write_text(json.dumps(good))
    assert read(tmp_path) == facts()
    for field, value in (
        ("privacy", None),
        ("history", 3),
        ("clients", [None]),
        ("refusals", [{"client": "a", "reason": "so"}]),
    ):
        (tmp_path / "run.json").write_text(json.dumps(good | {field: value}))
        with pytest.raises(ConfigError, match=field):
            read(tmp_path)


def test_the_command_takes_a_folder_and_the_bundle_in_it_or_another(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(_saved(facts())))
    small_bundle(tmp_path / "run" / "bundle", 0.5)
    small_bundle(tmp_path / "other", 0.5, run=passport().run.replace(name="other"))
    command = ["report", str(tmp_path / "run"), "--out", str(tmp_path / "run.html")]
    found = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(found.stdout)["bundle"] == str(tmp_path / "run" / "bundle")
    html = (tmp_path / "run.html").read_text()
    assert SIGNER in section(html, "handover").text
    said = " ".join(CliRunner().invoke(app, command).stdout.split())
    assert said.endswith(f"heart-1, finished, 4 rounds, {len(html.encode()):,} bytes")
    failed = CliRunner().invoke(app, [*command, "--bundle", str(tmp_path / "other")])
    assert failed.exit_code == 1
    assert "is a bundle of other" in " ".join(failed.stderr.split())
    assert (tmp_path / "run.html").read_text() == html
    assert CliRunner().invoke(app, ["report", "a/b", "--out", "x.html"]).exit_code == 1


def test_where_the_page_cannot_be_written_that_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="possible to write there"):
        write(tmp_path / "file" / "run.html", facts())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -- numbers -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(), max_size=6), st.booleans())
def test_an_axis_holds_what_is_drawn_on_it(values: list[float], from_zero: bool) -> None:
    found = axis(values, from_zero=from_zero)
    assert 2 <= len(found.ticks) <= 12
    for value in values:
        if abs(value) < 1e300:
            assert -1e-6 <= found.at(value, 1.0) <= 1 + 1e-6


def test_numbers_are_written_for_people() -> None:
    assert [amount(n) for n in (0, 999, 1000, 15_000, 999_900, 2.5e9)] == [
        *("0 bytes", "999 bytes", "1 kB", "15 kB", "1 MB", "2.5 GB")
    ]
    assert [duration(s) for s in (0.1234, 59.9, 61, 7260)] == ["0.123 s", "59.9 s", "1 min 1 s", "2 h 1 min"]
    assert spans([1, 2, 3, 5, 7, 8]) == f"1{TO}3, 5, 7{TO}8"
    assert thinned(range(10), 4) == [0, 3, 6, 9]
    assert thinned([], 4) == []
