"""Risk: a report that looks right in its author's browser only. Real Chromium opens it, clicks through it,
and any console error, network request, overflow or unreadable colour fails."""

from __future__ import annotations

import json
import re

import pytest
from browser import CHROMIUM, Page
from synthetic_run import film, make_run

from qlibero.reporting.html.document import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install -y chromium"),
]
HOSTILE = '</script><img src=x onerror="throw 1"> & <b>bold</b>'


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = make_run(tmp_path_factory.mktemp("run"), name="<i>name</i> & co", labels={"w4a8": HOSTILE, "aa": "A/A"})
    assert film(directory) >= 3
    out = directory / "report.html"
    write_report([directory], out)
    return out


@pytest.fixture(scope="module")
def page(report):
    with Page() as page:
        page.open(report)
        yield page


def test_opens_without_errors_and_without_a_network(page):
    assert page.problems == []
    assert page.js("document.querySelectorAll('main > section').length") >= 13
    assert page.js("document.querySelectorAll('[src^=http],[href^=http],link').length") == 0


def test_strings_from_configs_stay_strings(page):
    assert page.js("document.images.length") == 0
    assert page.js("JSON.parse(document.querySelector('#data').textContent).labels.w4a8") == HOSTILE
    assert page.js("document.querySelector('h1').textContent") == "<i>name</i> & co"
    assert page.js("[...document.querySelectorAll('h3')].filter(e => e.textContent.includes('</script>')).length") >= 2


def test_every_control_works(page):
    before = page.js("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.js("getComputedStyle(document.body).backgroundColor") != before
    page.click("#theme")
    assert page.js("getComputedStyle(document.body).backgroundColor") == before

    for i in range(page.js("document.querySelectorAll('nav a').length")):
        page.js(f"document.querySelectorAll('nav a')[{i}].click()")
    assert page.js("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")

    for i in range(page.js("document.querySelectorAll('summary').length")):
        page.js(f"document.querySelectorAll('summary')[{i}].click()")
    assert page.js("[...document.querySelectorAll('details')].every(d => d.open)")

    first = "[...document.querySelectorAll('#layers tbody tr')].map(r => parseFloat(r.children[1].textContent))"
    page.click("#layers thead th:nth-child(2) button")
    assert page.js(first) == sorted(page.js(first))
    page.click("#layers thead th:nth-child(2) button")
    assert page.js(first) == sorted(page.js(first), reverse=True)
    assert page.js("document.querySelector('#layers th[aria-sort]').getAttribute('aria-sort')") == "descending"

    for button in ("as-markdown", "as-latex"):
        page.click(f"[data-copy={button}]")
    page.js("new Promise(done => setTimeout(done, 300))")
    assert page.js("[...document.querySelectorAll('[data-copy]')].every(b => b.textContent !== 'Copy')")
    assert page.problems == []


def test_flip_map_speaks_and_plays(page):
    page.js("document.querySelector('.heatmap').focus()")
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        page.press(key)
    assert page.js("document.querySelector('#flip-readout').textContent").startswith(
        f"{HOSTILE}, libero_object task 0 “put object 0 away”, initial state 0:"
    )
    page.click(".heatmap")
    assert "libero_object task 1 “put object 1 away”, initial state" in page.js(
        "document.querySelector('#flip-readout').textContent"
    )

    key, arm = page.js("(o => [o.dataset.key, o.dataset.arm])(document.querySelector('#episode').options[1])")
    _, task, init, _ = key.split("/")
    page.js(f"(m => {{ m.focus(); }})(document.querySelector('.heatmap[data-arm={arm}]'))")
    at = page.js("[...document.querySelectorAll('.heatmap')].length")
    assert at == 3
    page.js(
        f"(m => {{ const b = m.getBoundingClientRect(); m.dispatchEvent(new MouseEvent('click', {{"
        f"clientX: b.x + b.width * ({init} + .5) / 10, clientY: b.y + b.height * ({task} + .5) / 3}})) }})"
        f"(document.querySelector('.heatmap[data-arm={arm}]'))"
    )
    assert page.js("document.querySelector('#episode').selectedIndex") == 1
    assert page.problems == []


def test_two_videos_share_one_clock(page):
    ready = (
        "Promise.all(['left', 'right'].map(s => new Promise(done => {"
        " const v = document.getElementById('video-' + s);"
        " v.readyState >= 2 ? done() : v.addEventListener('loadeddata', done) })))"
    )
    page.js(f"{ready}.then(() => 1)")
    times = "['left', 'right'].map(s => document.getElementById('video-' + s).currentTime)"
    page.js("(s => { s.value = 250; s.dispatchEvent(new Event('input')) })(document.querySelector('#scrub'))")
    left, right = page.js(times)
    assert left == pytest.approx(right, abs=0.01) and left > 0
    page.click("#to-divergence")
    page.js("new Promise(done => setTimeout(done, 700))")
    left, right = page.js(times)
    step = page.js("document.querySelector('#step').textContent")
    assert left == pytest.approx(right, abs=0.3) and int(step.removeprefix("step ")) >= 10
    assert "from step 20" in page.js("document.querySelector('#divergence-text').textContent")
    page.click("#play")
    assert page.js("document.querySelector('#play').textContent") in ("Play", "Pause")
    captions = page.js("['left', 'right'].map(s => document.getElementById('caption-' + s).textContent)")
    assert {c.rsplit(": ", 1)[1] for c in captions} == {"success", "failure"}
    assert page.problems == []


def test_every_finger_finds_its_target_and_no_column_is_lost_on_a_phone(report):
    with Page(390, 900) as page:
        page.open(report)
        page.js("document.querySelectorAll('details').forEach(d => d.open = true)")
        small = (
            "[...document.querySelectorAll('button, summary, nav a, select, input')]"
            ".filter(e => e.getClientRects().length && !e.closest('.skip') && e.getBoundingClientRect().height < 43.5)"
            ".map(e => e.outerHTML.slice(0, 80))"
        )
        assert page.js(small) == []
        hidden = (
            "[...document.querySelectorAll('table.stacked')]"
            ".filter(t => t.parentElement.scrollWidth > t.parentElement.clientWidth + 1).length"
        )
        assert page.js("document.querySelectorAll('table.stacked').length") >= 4 and page.js(hidden) == 0
        unnamed = (
            "[...document.querySelectorAll('.stacked td')]"
            ".filter(e => getComputedStyle(e, '::before').content.length < 3).length"
        )
        assert page.js(unnamed) == 0
        cut = "[...document.querySelectorAll('.caption')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        assert page.js(cut) == 0


def test_sane_for_screen_readers_and_keyboards(page):
    ids = page.js("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert (
        page.js("[...document.querySelectorAll('[role=img]')].filter(e => !e.getAttribute('aria-label')).length") == 0
    )
    assert page.js("[...document.querySelectorAll('th')].filter(e => !e.scope).length") == 0
    unlabelled = (
        "[...document.querySelectorAll('input,select')]"
        ".filter(e => !e.labels.length && !e.getAttribute('aria-label')).length"
    )
    assert page.js(unlabelled) == 0
    assert page.js("document.documentElement.lang") == "en"
    levels = page.js("[...document.querySelectorAll('h1,h2,h3')].map(e => +e.tagName[1])")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


CONTRAST = """(() => {
  const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const f = (x) => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
    return .2126 * f(r) + .7152 * f(g) + .0722 * f(b);
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > .9) return c;
    }
    return [255, 255, 255];
  };
  const weak = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || e.closest('option,script,style,i')) continue;
    const a = light(rgb(getComputedStyle(e).color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) weak.push(`${e.tagName}.${e.className} ${ratio.toFixed(2)} ${e.textContent.slice(0, 30)}`);
  }
  return weak;
})()"""


OVERRUN = """[...document.querySelectorAll('.count, .facts dd, .chip, h3')]
  .filter((e) => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline')
  .map((e) => e.textContent)"""


@pytest.mark.parametrize("width", [390, 820, 1280, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_readable_at_every_width_in_light_and_dark(report, width, dark):
    with Page(width, 900, dark) as page:
        page.open(report)
        page.js("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.js("document.documentElement.scrollWidth") <= width
        assert page.js(CONTRAST) == []
        assert page.js(OVERRUN) == []
        assert page.problems == []


@pytest.fixture(scope="module")
def thirty(tmp_path_factory):
    """30 arms under test, from as good as the reference to a third broken."""
    arms = {"baseline": 0.0, "aa": 0.02} | {f"w4a8_{i}": 0.012 * i for i in range(30)}
    directory = make_run(tmp_path_factory.mktemp("thirty"), arms, trajectories=False)
    write_report([directory], directory / "report.html")
    return directory / "report.html"


UPON_EACH_OTHER = """[...document.querySelectorAll('.canvas, .track, .ticks, .ylabels, .card, .row')].flatMap((box) => {
  const texts = [...box.querySelectorAll('*')]
    .filter((e) => !e.children.length && e.textContent.trim() && getComputedStyle(e).visibility === 'visible')
    .map((e) => {
      const range = document.createRange();
      range.selectNodeContents(e);
      return [e, range.getBoundingClientRect()];
    });
  return texts.flatMap(([one, a], i) => texts.slice(i + 1)
    .filter(([, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
    .map(([other]) => `${box.className}: ${one.textContent} / ${other.textContent}`));
})"""


@pytest.mark.parametrize("width", [390, 820, 1280])
def test_of_thirty_arms_no_label_lies_upon_another(thirty, width):
    with Page(width, 900) as page:
        page.open(thirty)
        assert page.js("document.querySelector('#verdicts details.numbers').open")
        page.js("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.js("document.querySelectorAll('#verdicts .card').length") == 31
        assert page.js(UPON_EACH_OTHER) == []
        assert page.js("document.documentElement.scrollWidth") <= width
        page.js("document.querySelectorAll('.ticks span').forEach(e => { e.style.left = '50%' })")
        assert page.js(UPON_EACH_OTHER) != []  # the check sees what it looks for


def _leading(text: str) -> float:
    """The number a cell of the table of verdicts shows first."""
    return float(re.search(r"[+-]?[\d.]+(e-?\d+)?", text.replace("−", "-"))[0])


def test_thirty_arms_sort_by_any_column_and_what_is_missing_comes_last(thirty):
    with Page() as page:
        page.open(thirty)
        for column in (3, 6):  # Δ; p of "no difference"
            cells = (
                f"[...document.querySelectorAll('#verdicts tbody tr')].map(r => r.children[{column - 1}].textContent)"
            )
            for down in (False, True):
                page.click(f"#verdicts thead th:nth-child({column}) button")
                shown = page.js(cells)
                numbers = [_leading(text) for text in shown if text != "–"]
                assert len(shown) == 31 and len(numbers) >= 30 and shown[len(numbers) :] == ["–"] * (31 - len(numbers))
                assert numbers == sorted(numbers, reverse=down) and len(set(numbers)) > 5


def test_cells_sort_by_what_they_mean(thirty):
    """A table by hand, read by the report's own script: signs, brackets, thousands, said values, words, nothing."""
    cells = [
        "–", "<span>w4a8</span>", "[−3.5, +1.0]", "−30.0 [−40, −19]", "1,200", "+2e-05", "0.mlp.up", "9 / 1 of 100",
        '<span data-value="0.5">2× slower</span>', '<span data-value="-1">as fast</span>', "",
    ]  # fmt: skip
    with Page() as page:
        page.open(thirty)
        rows = "".join(f"<tr><th>x</th><td>{cell}</td></tr>" for cell in cells)
        page.js(
            "document.querySelector('#verdicts table').tBodies[0].innerHTML ="
            f" {json.dumps(rows)}; document.querySelector('#verdicts thead th:nth-child(2) button').click()"
        )
        found = "[...document.querySelectorAll('#verdicts tbody td')].map(e => e.textContent)"
        numbers = ["−30.0 [−40, −19]", "[−3.5, +1.0]", "as fast", "+2e-05", "2× slower", "9 / 1 of 100", "1,200"]
        assert page.js(found) == [*numbers, "0.mlp.up", "w4a8", *sorted(["–", ""])]
        page.js("document.querySelector('#verdicts thead th:nth-child(2) button').click()")
        assert page.js(found)[:9] == [*numbers[::-1], "w4a8", "0.mlp.up"]


def test_nothing_runs_loads_or_leaves_that_is_not_the_reports_own(report, tmp_path):
    """Markup that got in all the same (here by hand) is powerless: no script, no style, no request, no frame."""
    planted = (
        "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'><style>body { display: none }</style>"
        "<iframe srcdoc='<script>parent.ran = 1</script>'></iframe><form action='https://evil.example'></form>"
        "<img src='https://evil.example/?leak'><base href='https://evil.example'>"
    )
    page = report.read_text()
    assert page.count("<main>") == 1
    (tmp_path / "planted.html").write_text(page.replace("<main>", f"<main>{planted}"))
    with Page() as browser:
        browser.open(tmp_path / "planted.html")
        assert browser.js("[window.ran ?? 0, getComputedStyle(document.body).display]") == [0, "block"]
        assert browser.js("fetch('data:,x').then(() => 1, () => 0)") == 0
        assert browser.js("document.baseURI.startsWith('file:')")
        refused = [problem for problem in browser.problems if "Content Security Policy" in problem]
        assert len(refused) >= 5, browser.problems
