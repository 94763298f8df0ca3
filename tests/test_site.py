"""The static site in a real Chromium: sort, filter, hover, keyboard, phone, light and dark."""

from __future__ import annotations

import base64
import hashlib
import html as html_text
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find
from conftest import Command
from hypothesis import given, settings
from hypothesis import strategies as st
from test_board import divergence_record, with_incidence
from test_report import EVIL, N, make_record, put, sealed

from membench.errors import MembenchError
from membench.record import RECORD, SHEET
from membench.registry import Registry
from membench.report.html import Markup, data_block, el, page
from membench.report.ranking import rank_section
from membench.report.records import load_records, sections
from membench.report.site import MARK, build_site
from membench.report.site_charts import images_chart, threshold_chart
from membench.report.site_pages import dataset_page, overview, slug
from membench.report.site_record import record_page

chromium = pytest.mark.skipif(find() is None, reason="no Chromium here (Debian: chromium)")
HOSTILE = f'{EVIL}</script><img src=x onerror=alert(2)>" onmouseover="alert(3)'


def fill(folder: Path) -> list[dict[str, Any]]:
    """Boards with three methods, two seeds, and one whose every name is an attack."""
    import numpy as np

    rng = np.random.default_rng(0)
    found = {side: rng.random((N, 60)) < 0.02 for side in ("members", "heldout")}
    records = []
    for seed in (0, 1):
        records += [
            make_record("random", rate=0.1, seed=seed, scales=("0",)),
            make_record("side_c", rate=0.5, seed=seed),
            make_record("side_a", rate=0.3, seed=seed),
        ]
    evil = make_record(HOSTILE, target=HOSTILE, mitigation={"name": HOSTILE})
    evil["cost"]["stages"][0]["stage"] = HOSTILE
    evil["provenance"]["machine"] = HOSTILE
    evil["attack"]["surrogate"] = HOSTILE
    records.append(evil)
    records = [sealed(with_incidence(record, found)) for record in records]
    put(folder, *records)
    (folder / "published").mkdir()
    quoted = HOSTILE.replace("\n", " ").replace('"', '""')
    (folder / "published/toy.csv").write_text(
        "source,method,band,ams_percent,ums_percent\n" + ",".join([f'"{quoted}"'] * 5) + "\n"
    )
    path = folder / "divergence/toy/x.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(divergence_record({"name": HOSTILE})))
    return records


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("boards")
    return folder, fill(folder)


@pytest.fixture(scope="module")
def site(records: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    build_site(records[0], out, Registry())
    return out


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def browser(running: Browser) -> Browser:
    running.size(1280, 900)
    running.colours("light")
    running.requests.clear()
    running.errors.clear()
    return running


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


# --- Pages, without a browser -----------------------------------------------------------------


class Shape(HTMLParser):
    """Tags and the names of their attributes, and where links and pictures lead."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[Any] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, _ in attrs]))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(f"/{tag}")

    def handle_comment(self, data: str) -> None:
        self.found.append("comment")


def shapes(name: str, note: str) -> list[Any]:
    """Of all three kinds of page, a name standing wherever somebody else chooses it."""
    record = make_record(name, target=name, mitigation={"name": name}, parameters={"x": note})
    record["attack"]["surrogate"] = note
    record["cost"]["stages"][0]["stage"] = note
    record["provenance"]["machine"] = name
    found = [rank_section(section) for section in sections([sealed(record)])]
    published = [dict.fromkeys(("method", "source", "band", "ams_percent", "ums_percent"), name)]
    bodies = [
        overview({"toy": found}, [note]),
        dataset_page(name, found, calibration=None, divergences=[], published=published),
        record_page(record, None),
    ]
    nav = [(name, f"data/{slug(name)}.html", True)]
    return [Shape(page(name, body, nav, "../")).found for body in bodies]


PLAIN = shapes("plain", "words")


@settings(max_examples=25, deadline=None)
@given(
    st.text(max_size=40) | st.text(alphabet="<>&\"'/=-! \n\u202eabs`", max_size=30),
    st.text(alphabet="<>&\"'/=!-\n ab", max_size=20),
)
def test_no_name_changes_a_page(name: str, note: str) -> None:
    """The same elements and attributes as with a harmless name, by Python's own HTML parser."""
    assert shapes(name, note) == PLAIN


@pytest.mark.parametrize("name", [HOSTILE, "</title><script>x</script>", "--><b>", "' a='1"])
def test_known_attacks_change_no_page(name: str) -> None:
    assert shapes(name, name[::-1]) == PLAIN
    assert shapes(name[::-1], name) == PLAIN


@given(st.text())
def test_data_for_the_script_cannot_end_its_element(text: str) -> None:
    found = data_block({"x": text, "y": "</script><!--"})
    inside = found.removeprefix('<script type="application/json">').removesuffix("</script>")
    assert "<" not in inside
    assert json.loads(inside) == {"x": text, "y": "</script><!--"}


def test_elements_escape_what_they_are_given() -> None:
    assert el("p", "<b>", Markup("<i>x</i>"), title='"&') == (
        '<p title="&quot;&amp;">&lt;b&gt;<i>x</i></p>'
    )
    assert el("input", hidden=True, data_value=None) == "<input hidden>"


@given(st.lists(st.text(), unique=True, max_size=8))
def test_file_names_are_plain_and_distinct(names: list[str]) -> None:
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]*", s) and not s.startswith(".") for s in slugs)


def test_pages_load_nothing_and_say_so(site: Path) -> None:
    """Style and script stand in the page, allowed by their hashes; links stay in the folder."""
    assert len(pages(site)) == 1 + 1 + 7
    for path in pages(site):
        text = path.read_text()
        policy = html_text.unescape(
            re.search(r'Content-Security-Policy" content="([^"]*)', text).group(1)  # type: ignore[union-attr]
        )
        for kind in ("style", "script"):
            (content,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{kind}-src 'sha256-{digest}'" in policy
        assert policy.startswith("default-src 'none'")
        assert not re.search(r"\s(?:src|action)=\"(?!data:)", text)
        for link in re.findall(r'href="([^"#]+)"', text):
            assert (path.parent / link).resolve().is_relative_to(site)
            assert (path.parent / link).is_file(), link


def test_a_record_page_comes_with_its_record(site: Path, records: tuple[Path, Any]) -> None:
    for record in records[1]:
        short = record["id"][:16]
        assert json.loads((site / f"record/{short}.json").read_text()) == record
        text = (site / f"record/{short}.html").read_text()
        assert record["id"] in text
        assert record["results_sha256"] in text


def test_contact_sheets_are_shown_only_where_the_card_permits(
    records: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only the sheet of the very run: same results."""
    record, other = records[1][0], records[1][1]
    run = tmp_path / "results/runs/toy/ddpm/random"
    run.mkdir(parents=True)
    (run / RECORD).write_text(json.dumps(record))
    (run / SHEET).write_bytes(b"\x89PNG picture")
    picture = base64.b64encode(b"\x89PNG picture").decode()

    def shown(registry: Registry, which: dict[str, Any], out: str) -> bool:
        build_site(records[0], tmp_path / out, registry, tmp_path / "results")
        return picture in (tmp_path / out / f"record/{which['id'][:16]}.html").read_text()

    registry = Registry()
    assert not shown(registry, record, "a"), "no card of that name: nobody knows"
    card = registry.card("fashion_mini")
    assert card.show_images
    monkeypatch.setattr(registry, "card", lambda name: card)
    assert shown(registry, record, "b")
    assert not shown(registry, other, "b")
    kept = card.model_copy(update={"show_images": False})
    monkeypatch.setattr(registry, "card", lambda name: kept)
    assert not shown(registry, record, "b"), "written over an earlier site"


def test_a_folder_that_holds_something_else_is_left_alone(
    records: tuple[Path, Any], tmp_path: Path
) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(MembenchError, match="holds something else"):
        build_site(records[0], tmp_path, Registry())
    assert [p.name for p in tmp_path.iterdir()] == ["letters.txt"]


def test_records_that_left_the_boards_leave_the_site(
    records: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    boards = Path(shutil.copytree(records[0], tmp_path / "boards"))
    build_site(boards, tmp_path / "site", Registry())
    gone = records[1][0]["id"]
    (boards / f"records/toy/{gone}.json").unlink()
    build_site(boards, tmp_path / "site", Registry())
    assert not list((tmp_path / "site").rglob(f"{gone[:16]}*"))
    assert (tmp_path / "site" / MARK).is_file()


def test_site_on_the_command_line(command: Command, records: tuple[Path, Any]) -> None:
    assert "wrote 9 pages" in command("leaderboard", "site", "out", "--dir", records[0]).stdout


# --- In a browser -----------------------------------------------------------------------------


@chromium
def test_every_page_runs_without_an_error_a_request_or_an_alert(
    site: Path, browser: Browser
) -> None:
    for path in pages(site):
        browser.open(path)
        assert browser.run("document.querySelectorAll('script:not([type])').length") == 1
        assert browser.run("document.querySelectorAll('img, iframe, object').length") == 0
    assert browser.errors == []
    assert all(url.startswith("file:") for url in browser.requests)
    assert len(browser.requests) == len(pages(site)), "a page asked for more than itself"
    browser.open(site / "data/toy.html")
    shown = browser.run("document.querySelector('main').textContent")
    assert "<script>alert(1)</script>" in shown, "a hostile name is text"


def column(browser: Browser, number: int) -> list[str]:
    rows = "[...document.querySelectorAll('.filterable tbody tr')].filter(r => !r.hidden)"
    return browser.run(f"{rows}.map(r => r.cells[{number}].firstChild.textContent)")


@chromium
def test_tables_sort_by_mouse_and_keyboard(site: Path, browser: Browser) -> None:
    browser.open(site / "data/toy.html")
    place = "document.querySelectorAll('.filterable th[aria-sort]')[3]"
    assert browser.run(f"{place}.textContent") == "excess AMS, %"
    before = [float(value) for value in column(browser, 3)]
    browser.run(f"{place}.querySelector('button').click()")
    assert browser.run(f"{place}.getAttribute('aria-sort')") == "descending"
    assert [float(value) for value in column(browser, 3)] == sorted(before, reverse=True)
    browser.run(f"{place}.querySelector('button').focus()")
    browser.press("Enter")
    assert browser.run(f"{place}.getAttribute('aria-sort')") == "ascending"
    assert [float(value) for value in column(browser, 3)] == sorted(before)
    browser.press("Tab")
    browser.press(" ")  # the next heading
    assert browser.run(f"{place}.getAttribute('aria-sort')") == "none"
    assert browser.run(f"{place}.nextElementSibling.getAttribute('aria-sort')") == "descending"


@chromium
def test_tables_filter(site: Path, browser: Browser) -> None:
    browser.open(site / "data/toy.html")
    assert set(column(browser, 10)) == {"mid"}
    assert browser.run("document.querySelector('.status').textContent") == "4 of 12 rows"

    def choose(selector: str, value: str) -> None:
        browser.run(
            f"(() => {{ const c = document.querySelector({json.dumps(selector)}); "
            f"c.value = {json.dumps(value)}; c.dispatchEvent(new Event('input')); }})()"
        )

    choose("[data-filter=band]", "")
    assert len(column(browser, 0)) == 12
    choose("[data-filter=method]", "side_a")
    assert set(column(browser, 0)) == {"side_a"}
    assert set(column(browser, 10)) == {"low", "mid", "high"}
    choose("[data-filter='*']", "nothing of the kind")
    assert browser.run("document.querySelector('.status').textContent") == "0 of 12 rows"
    choose("[data-filter='*']", "LOW side")
    assert column(browser, 10) == ["low"]


def tooltip(browser: Browser) -> list[list[str]]:
    return browser.run(
        "[...document.querySelectorAll('.chart .tip:not([hidden]) tbody tr')]"
        ".map(r => [...r.cells].map(c => c.textContent))"
    )


@chromium
def test_charts_read_out_their_data(
    site: Path, records: tuple[Path, Any], browser: Browser
) -> None:
    """By mouse and by keyboard, the very numbers that the chart was given."""
    found = [rank_section(s) for s in sections(load_records(records[0] / "records")["toy"])]
    ranked = next(r for r in found if r.section.target == "ddpm")
    threshold, images = threshold_chart(ranked), images_chart(ranked)
    assert threshold is not None
    assert images is not None
    browser.open(site / "data/toy.html")
    titles = browser.run("[...document.querySelectorAll('.chart h3')].map(h => h.textContent)")
    start = browser.run(
        "[...document.querySelectorAll('main > h2')].findIndex(h => h.textContent === 'ddpm')"
    )
    assert start >= 0
    for chart in (threshold, images):
        index = titles.index(chart["title"])
        if found[0] is not ranked:  # the hostile target comes first
            index = titles.index(chart["title"], index + 1)
        svg = f"document.querySelectorAll('.chart')[{index}].querySelector('.plot > svg')"
        browser.run(f"{svg}.scrollIntoView({{block: 'center'}})")
        left, top, width, height = browser.run(
            f"(() => {{ const r = {svg}.getBoundingClientRect(); "
            "return [r.left, r.top, r.width, r.height] })()"
        )
        browser.hover(left + width - 14, top + height / 2)
        last = {
            (s["name"], s["side"]): f"{s['y'][-1]:,.1f}".removesuffix(".0") for s in chart["series"]
        }
        rows = {row[0]: row[1:] for row in tooltip(browser)}
        for (name, side), value in last.items():
            assert rows[name][0 if side == "members" else 1] == value, (name, side)
        browser.hover(left + width / 2, max(top - 40, 1))
        assert tooltip(browser) == []
        browser.run(f"{svg}.focus()")
        browser.press("ArrowRight", 3)
        third = {s["name"]: s["y"][2] for s in chart["series"] if s["side"] == "members"}
        for name, *cells in tooltip(browser):
            assert float(cells[0]) == pytest.approx(third[name], abs=0.051)
        browser.press("Escape")
        assert tooltip(browser) == []
        legend = f"document.querySelectorAll('.chart')[{index}].querySelector('.legend button')"
        paths = f"{svg}.querySelectorAll('path').length"
        assert browser.run(paths) == len(chart["series"])
        browser.run(f"{legend}.focus()")
        browser.press(" ")
        assert browser.run(f"{legend}.getAttribute('aria-pressed')") == "false"
        assert browser.run(paths) == len(chart["series"]) - 2


@chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_scrolls_sideways_on_a_phone(site: Path, browser: Browser, scheme: str) -> None:
    browser.size(390, 844)
    browser.colours(scheme)
    for path in pages(site):
        browser.open(path)
        assert browser.run("innerWidth") == 390
        assert browser.run("document.documentElement.scrollWidth") <= 390, path
        small = browser.run(
            "[...document.querySelectorAll('button, select, input')].filter(e => e.offsetParent && "
            "!e.closest('th') && e.getBoundingClientRect().height < 32).length"
        )
        assert small == 0, "a control too small for a finger"


CONTRAST = """(() => {
  const linear = (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const lum = (c) => c.map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c.slice(0, 3); }
    return [255, 255, 255]; };
  const worst = [];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    if (!e.checkVisibility() || e.closest('script, style, .visually-hidden')) continue;
    const style = getComputedStyle(e);
    const ink = parse(e.namespaceURI.includes('svg') ? style.fill : style.color).slice(0, 3);
    const [a, b] = [lum(ink), lum(behind(e))].sort((x, y) => y - x);
    worst.push([(a + .05) / (b + .05), e.tagName]);
  }
  return worst.sort((x, y) => x[0] - y[0])[0];
})()"""


@chromium
def test_text_can_be_read_in_light_and_dark(site: Path, browser: Browser) -> None:
    """At least 4.5 : 1 between every text and what lies behind it (WCAG AA), all kinds of page."""
    some = [site / "index.html", site / "data/toy.html", next(site.glob("record/*.html"))]
    grounds = {}
    for scheme in ("light", "dark"):
        browser.colours(scheme)
        for path in some:
            browser.open(path)
            ratio, tag = browser.run(CONTRAST)
            assert ratio >= 4.5, (scheme, path.name, tag, ratio)
        grounds[scheme] = browser.run("getComputedStyle(document.body).backgroundColor")
    assert grounds["light"] != grounds["dark"]
    button = "document.querySelector('.theme')"
    for expected, ground in (("light", "light"), ("dark", "dark"), ("auto", "dark")):
        browser.run(f"{button}.click()")  # the system says dark
        assert browser.run(f"{button}.textContent") == f"Theme: {expected}"
        now = browser.run("getComputedStyle(document.body).backgroundColor")
        assert now == grounds[ground]


@chromium
def test_tab_reaches_everything_in_order_and_shows_where_it_is(
    site: Path, browser: Browser
) -> None:
    browser.open(site / "data/toy.html")
    kinds = "a[href], button, input, select, summary, [tabindex='0']"
    every = f'[...document.querySelectorAll("{kinds}")].filter(e => e.checkVisibility())'
    count = browser.run(f"window.every = {every}; every.length")
    order, outlines = [], []
    for _ in range(count):
        browser.press("Tab")
        order.append(browser.run("every.indexOf(document.activeElement)"))
        outlines.append(
            browser.run(
                "(() => { const s = getComputedStyle(document.activeElement); "
                "return s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 1 })()"
            )
        )
    assert order == list(range(count))
    assert all(outlines)
    assert browser.run("document.querySelectorAll('[onclick], a:not([href])').length") == 0
