"""Risk: the open report shows yesterday's numbers, throws away what its reader did, or shows them to somebody else."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from browser import CHROMIUM, Page
from synthetic_run import arm_meta, episode, film

from qlibero.results.ledger import Ledger, write_meta

pytestmark = pytest.mark.slow

ARMS = ("baseline", "w4a8")


class Growing:
    """A run directory whose ledgers, real ones, grow while it is open."""

    def __init__(self, directory: Path):
        self.directory, self.ledgers = directory, {}
        directory.mkdir()
        config = {"name": "growing", "suite": "libero_object", "tasks": [0, 1, 2], "episodes_per_task": 10, "seed": 7,
                  "backends": list(ARMS)}  # fmt: skip
        (directory / "experiment.yaml").write_text(yaml.safe_dump(config))

    def add(self, task: int, inits: range, flipped: bool = False) -> None:
        for arm in ARMS:
            if arm not in self.ledgers:
                self.ledgers[arm] = Ledger(self.directory, arm, 0, f"hash of {arm}").__enter__()
                write_meta(self.directory, arm, arm_meta(arm, arm))
            for init in inits:
                record, rows = episode("libero_object", task, init, arm, flipped and arm == "w4a8", False, 0)
                self.ledgers[arm].append(record, rows)


@pytest.fixture
def opened(tmp_path):
    """(growing run, its URL, the process of `qlibero open`)."""
    run = Growing(tmp_path / "run")
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")}
    command = [sys.executable, "-m", "qlibero", "open", str(run.directory)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    line = process.stderr.readline()
    url = next(word for word in line.split() if word.startswith("http://127.0.0.1:"))
    yield run, url, process
    process.kill()
    process.communicate()


def ask(url: str, host: str | None = None, path: str = "/state") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    answer.read()
    return answer


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "evil.example:{port}", "[::1]:{port}"])
def test_only_this_host_is_answered_and_only_what_there_is(opened, host):
    _, url, process = opened
    port = urlsplit(url).port
    assert ask(url).status == 200 and ask(url, f"localhost:{port}").status == 200
    assert ask(url, host.format(port=port)).status == 403
    assert ask(url, path="/../../etc/passwd").status == 404 and ask(url, path="/experiment.yaml").status == 404
    assert ask(url).headers["Access-Control-Allow-Origin"] is None
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert {fields[1] for fields in listening if fields[1].endswith(f":{port:04X}") and fields[3] == "0A"} == {
        f"0100007F:{port:04X}"
    }
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def test_a_directory_that_is_not_there_is_a_wrong_request(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "qlibero", "open", str(tmp_path / "no")], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no such run directory" in done.stderr


def until(page: Page, expression: str, within_s: float = 60.0) -> None:
    end = time.monotonic() + within_s
    while not page.js(expression):
        assert time.monotonic() < end, (expression, page.js("document.body.innerText")[:800], page.problems)
        time.sleep(0.2)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install -y chromium")
def test_new_episodes_flips_videos_and_the_verdict_appear_without_reloading(opened):
    run, url, process = opened
    with Page(server=url) as page:
        page.open(url)
        page.js("window.sameDocument = 1")
        until(page, "document.querySelector('h1').textContent === 'No results yet'")

        run.add(0, range(10))
        until(page, "document.querySelector('.facts-line')?.textContent.includes('20 of 60 planned episodes')")
        assert page.js("document.querySelector('#verdicts').innerText.includes('w4a8')")
        assert page.js("document.querySelectorAll('.heatmap').length") == 1
        assert page.js("document.querySelector('#live').textContent") == "live"

        page.js("document.querySelectorAll('details').forEach((d, i) => { d.open = i % 2 === 0 })")
        kept = page.js("[...document.querySelectorAll('details')].map(d => d.open)")
        page.js("scrollTo({ top: 500, behavior: 'instant' })")
        before = page.js("document.querySelector('#verdicts').innerText")
        run.add(1, range(10), flipped=True)
        assert film(run.directory, 2) == 2
        until(page, "document.querySelector('.facts-line').textContent.includes('40 of 60 planned episodes')")
        until(page, "document.querySelectorAll('#episode option').length === 2")
        assert page.js("document.querySelector('#verdicts').innerText") != before
        assert page.js("scrollY") == 500
        assert page.js("[...document.querySelectorAll('details')].map(d => d.open)")[: len(kept)] == kept

        page.click("#theme")  # the new page's controls work
        assert page.js("document.documentElement.dataset.theme") == "dark"
        page.js(
            "(s => { s.selectedIndex = 1; s.dispatchEvent(new Event('change')) })(document.querySelector('#episode'))"
        )
        chosen = page.js("document.querySelector('#episode').selectedOptions[0].dataset.key")
        run.add(2, range(10))
        until(page, "document.querySelector('.facts-line').textContent.includes('60 of 60 planned episodes')")
        assert page.js("document.querySelector('#episode').selectedOptions[0].dataset.key") == chosen
        assert page.js("document.documentElement.dataset.theme") == "dark"
        assert page.js("window.sameDocument") == 1, "the page was reloaded"
        assert page.problems == []

        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        until(page, "document.querySelector('#live').textContent.startsWith('qlibero open has ended')")
        assert page.js("document.querySelector('.facts-line').textContent.includes('60 of 60')")
