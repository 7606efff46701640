"""The report as Markdown and as a page: what stands there, that data stays data, and how a browser shows it."""

import json
import os
import re
import select
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from data.shards import write_shards
from eval import html, markdown, page
from tests.tiny import CLASSES, open_shards, samples

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60  # seconds
HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """A results.json, schema 2."""
    return {
        "schema": 2,
        "about": {"encoder": {"folder": f"runs/{HOSTILE}", "sha256": "ab" * 32}, "classes": list(CLASSES)},
        "results": {
            "linear/image": {
                "metrics": {
                    "top1": {"value": 0.9, "interval": [0.85, 0.95]},
                    "mean_per_class": {"value": 0.8, "interval": None},
                },
                "baselines": {"chance": {"top1": 0.1}, "raw": {"top1": 0.86}, "random_init": {"top1": 0.85}},
                "chosen": {"strength": 10.0},
                "counts": {"test": 400},
            },
            "linear/audio": {
                "metrics": {"top1": {"value": 0.9, "interval": [0.88, 0.92]}},
                "baselines": {"chance": {"top1": 0.1}},
            },
            f"retrieval/{HOSTILE}": {"metrics": {"median_rank": {"value": 3.0, "interval": [2.0, 4.0]}}},
        },
    }


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A page.json of tiny shards, with everything on it; the captions and a class are hostile."""
    folder = tmp_path_factory.mktemp("page")
    found = [{**sample, "txt": f"{HOSTILE} {i}".encode()} for i, sample in enumerate(samples("test", 12))]
    source = open_shards(write_shards(iter(found), folder / "test", max_samples=30))
    run = folder / "run"
    (run / "pictures").mkdir(parents=True)
    (run / "pictures" / "step-1.png").write_bytes(bytes(found[0]["png"]))  # type: ignore[arg-type]
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 11):
            line = {"step": step, "loss": 5 / step, "rankme/image": step, "rankme/text": 2 * step, "skipped": 0}
            file.write(json.dumps(line) + "\n")
    torch.manual_seed(0)
    labels = torch.arange(12) % 3
    names = ["low", 2 * HOSTILE, "high"]
    joint = {
        name: page.Joint(
            torch.randn(12, 8), torch.arange(12), page.class_names(labels, names), labels, torch.arange(12)
        )
        for name in ("image", "text", "audio")
    }
    confusions = {"linear/image": page.confusion(labels.roll(1), labels, names)}
    return page.make(source, joint, confusions, run)


def test_markdown_has_every_number_beside_its_baselines(document: dict[str, Any]) -> None:
    lines = markdown.render(document).splitlines()
    assert "|  | metric | value | 95 % interval | random encoder | raw input | chance | clear of baselines |" in lines
    assert "| image | top1 | 90.0 | 85.0 to 95.0 | 85.0 | 86.0 | 10.0 | no: random encoder, raw input |" in lines
    assert "| image | mean_per_class | 80.0 |  |  |  |  |  |" in lines
    assert "| audio | top1 | 90.0 | 88.0 to 92.0 |  |  | 10.0 | yes |" in lines
    assert "- image: strength: 10, test: 400" in lines
    assert any(line.endswith("| median_rank | 3 | 2 to 4 |  |") for line in lines)  # no share, so no verdict


@pytest.mark.parametrize("text", ["a|b", "<b>", "`x`", "*x*", "_x_", "[a](b)", "# x", "a\nb"])
def test_markdown_escapes(text: str) -> None:
    escaped = markdown.escape(text)
    assert "\n" not in escaped
    assert not re.search(r"(?<!\\)[|<`*\[#]|(?<![\\\w])_", escaped)


@pytest.mark.parametrize(
    ("metric", "share"),
    [
        *((name, True) for name in ("top1", "r10", "shots_5/top1", "map", "mean_per_class", "f1", "top1@5")),
        *((name, False) for name in ("median_rank", "rankme", "uniformity", "gap", "remap", "r")),
    ],
)
def test_only_shares_are_in_per_cent(metric: str, share: bool) -> None:
    entry = {"metrics": {metric: {"value": 0.5, "interval": None}}}
    (row,) = markdown.families({"results": {"task/x": entry}})["task"].rows
    assert (row.share, row.number) == (share, "50.0" if share else "0.5")


@pytest.mark.parametrize(
    ("metric", "interval", "number", "spread", "verdict"),
    [
        ("gain", [0.0075, 0.0425], "+2.2", "+0.8 to +4.2", "fusing: helps"),
        ("gain", [-0.95, -0.7825], "+2.2", "-95.0 to -78.2", "fusing: hurts"),
        ("gain", [0.0, 0.04], "+2.2", "+0.0 to +4.0", "fusing: unclear"),
        ("gain", None, "+2.2", "", ""),
        ("spread_5shot", None, "2.2", "", ""),
    ],
)
def test_gains_and_spreads_are_in_points(
    metric: str, interval: list[float] | None, number: str, spread: str, verdict: str
) -> None:
    entry = {"metrics": {metric: {"value": 0.0221, "interval": interval}}, "baselines": {"raw": {metric: 0.5}}}
    (row,) = markdown.families({"results": {"fusion/concat": entry}})["fusion"].rows
    assert (row.number, row.range, row.verdict, row.share) == (number, spread, verdict, False)
    page = html.render({"results": {"fusion/concat": entry}}, {"schema": 1, "left_out": []})
    assert f'<td class="number value">{number}</td>' in page


def test_what_a_missing_modality_does_has_tables_of_its_own() -> None:
    entry = {"metrics": {"top1": {"value": 0.5, "interval": None}}}
    names = ("fusion/concat", "fusion/concat_without_image", "fusion/vote_without_image", "fusion/vote")
    found = markdown.families({"results": dict.fromkeys(names, entry)})
    assert {name: [row.variant for row in family.rows] for name, family in found.items()} == {
        "fusion": ["concat", "vote"],
        "fusion without image": ["concat", "vote"],
    }


class Elements(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_needs_nothing_but_itself(document: dict[str, Any], drawn: dict[str, Any]) -> None:
    text = html.render(document, drawn)
    elements = Elements(text)
    sources = {name for _, attributes in elements.found for name in attributes if name in ("src", "href", "srcset")}
    assert not sources
    assert not {tag for tag, _ in elements.found} & {"link", "iframe", "base", "object", "embed"}
    assert "@import" not in text
    assert "url(" not in text
    policy = next(attributes["content"] for tag, attributes in elements.found if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy


def test_data_can_not_become_markup(document: dict[str, Any], drawn: dict[str, Any]) -> None:
    text = html.render(document, drawn, title=HOSTILE)
    elements = Elements(text)
    assert not [tag for tag, _ in elements.found if tag == "img"]
    assert not [attributes for _, attributes in elements.found if "onerror" in attributes]
    assert HOSTILE not in text
    (data,) = [word for word in elements.words if word.startswith("{")]
    assert json.loads(data) == drawn  # and nothing is lost by it


def test_a_number_that_is_not_finite_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="JSON"):
        html.render(document, {"curves": {"loss": [[1, float("nan")]]}})


class NoBrowserError(Exception):
    """What is called so is none."""


class Browser:
    """Chromium, spoken to through a pipe in its DevTools protocol."""

    def __init__(self, folder: Path) -> None:
        command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
        down, up = os.pipe(), os.pipe()
        # It reads from descriptor 3 and writes to 4.
        script = f'exec "$@" --remote-debugging-pipe 3<&{down[0]} 4>&{up[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=(down[0], up[1]), stderr=subprocess.DEVNULL
        )
        os.close(down[0])
        os.close(up[1])
        self._down, self._up = os.fdopen(down[1], "wb"), os.fdopen(up[0], "rb")
        self._sent, self._rest, self._session, self._heard = 0, b"", "", False
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._sent += 1
        message: dict[str, Any] = {"id": self._sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        try:
            self._down.write(json.dumps(message).encode() + b"\0")
            self._down.flush()
        except BrokenPipeError as error:
            assert not self._heard, "the browser has gone"
            raise NoBrowserError(f"{BROWSER} ended before it said a word") from error
        while (answer := self._next()).get("id") != self._sent:
            self.events.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._up], [], [], PATIENCE)[0], f"{BROWSER} says nothing for {PATIENCE} s"
            piece = os.read(self._up.fileno(), 1 << 16)
            if not piece and not self._heard:
                raise NoBrowserError(f"{BROWSER} ended before it said a word")
            assert piece, "the browser has gone"
            self._rest, self._heard = self._rest + piece, True
        message, self._rest = self._rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, file: Path, width: int, dark: bool = False) -> None:
        self.events.clear()
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        self.send("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def ask(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def move(self, selector: str, kind: str = "mouseMoved") -> None:
        """The mouse onto the middle of an element."""
        box = self.ask(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({block: 'center'}); const box = node.getBoundingClientRect();"
            "return [box.left + box.width / 2, box.top + box.height / 2]; })()"
        )
        pressed = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], **pressed)

    def complaints(self) -> list[Any]:
        """What a developer's console would show in red, and requests to anywhere."""
        return [
            event
            for event in self.events
            if event.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
            or (
                event.get("method") == "Network.requestWillBeSent"
                and not event["params"]["request"]["url"].startswith(("data:", "file:"))
            )
        ]

    def close(self) -> None:
        self.send("Browser.close")
        self.process.wait(20)
        self._down.close()
        self._up.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    try:
        browser = Browser(tmp_path_factory.mktemp("browser"))
    except NoBrowserError as error:  # Ubuntu's chromium-browser only says where to get one
        pytest.skip(str(error))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def file(document: dict[str, Any], drawn: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html.render(document, drawn), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_a_browser_shows_all_of_it_without_a_complaint(browser: Browser, file: Path, width: int, dark: bool) -> None:
    browser.open(file, width, dark)
    assert browser.ask("[...document.querySelectorAll('section:not([hidden])')].map(node => node.id)") == [
        "results", "curves", "confusion", "map", "gallery", "pictures", "about",
    ]  # fmt: skip
    assert browser.ask("document.querySelectorAll('.chart').length") == 2  # loss, and one for both rankme
    assert browser.ask("document.querySelectorAll('.point').length") == 36
    assert browser.ask("document.querySelectorAll('.matrix td').length") == 1 + 9
    assert browser.ask("document.querySelectorAll('.query').length") == 6 * page.QUERIES
    audio = "document.querySelectorAll('#gallery audio[controls]').length"
    assert browser.ask(audio) == 2 * page.QUERIES * (1 + page.FOUND)
    broken = "Promise.all([...document.images].map(image => image.decode())).then(() => 'sound')"
    answer = browser.send("Runtime.evaluate", expression=broken, returnByValue=True, awaitPromise=True)
    assert answer["result"]["value"] == "sound"
    assert browser.ask("document.documentElement.scrollWidth") <= width  # nothing sticks out
    assert browser.complaints() == []


def test_a_sound_can_be_played(browser: Browser, file: Path) -> None:
    browser.open(file, 1200)
    load = (
        "new Promise((done, fail) => { const audio = document.querySelector('#gallery audio');"
        "audio.onloadedmetadata = () => done(audio.duration); audio.onerror = () => fail(audio.error.message);"
        "audio.load(); audio.preload = 'auto'; })"
    )
    answer = browser.send("Runtime.evaluate", expression=load, returnByValue=True, awaitPromise=True)
    assert answer["result"]["value"] == pytest.approx(0.25)


def test_pointing_shows_the_sample_and_clicking_keeps_it(browser: Browser, file: Path) -> None:
    browser.open(file, 1200)
    assert browser.ask("document.getElementById('tip').hidden")
    browser.move(".point:nth-child(5)")
    assert not browser.ask("document.getElementById('tip').hidden")
    shown = browser.ask("document.getElementById('tip').textContent")
    assert f"{HOSTILE} " in shown  # the caption, as text
    assert "test-" in shown
    assert browser.ask("document.querySelectorAll('#tip img').length") == 1  # and not the caption's
    browser.move(".point:nth-child(5)", "mousePressed")
    browser.move(".point:nth-child(5)", "mouseReleased")
    assert browser.ask("document.querySelectorAll('.pinned audio[controls]').length") == 1
    assert browser.complaints() == []


def test_pointing_at_a_curve_shows_its_values(browser: Browser, file: Path) -> None:
    browser.open(file, 1200)
    browser.move(".chart:nth-child(2) svg")
    shown = browser.ask("[...document.querySelectorAll('#tip p')].map(node => node.textContent)")
    # The chart's middle is a little left of that of steps 1 .. 10: the axis takes its room.
    assert shown == ["step 5", "image: 5", "text: 10"]
    browser.ask("document.querySelector('.chart:nth-child(2) svg').focus()")
    browser.send("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    assert browser.ask("document.querySelector('#tip p').textContent") == "step 6"


def test_a_page_of_results_alone_has_no_empty_sections(
    browser: Browser, tmp_path: Path, document: dict[str, Any]
) -> None:
    path = tmp_path / "report.html"
    path.write_text(html.render(document, {"schema": 1, "left_out": []}), encoding="utf-8")
    browser.open(path, 390)
    assert browser.ask("[...document.querySelectorAll('section:not([hidden])')].length") == 2
    assert browser.ask("document.documentElement.scrollWidth") <= 390
    assert browser.complaints() == []


def test_a_large_confusion_scrolls_within_the_page(browser: Browser, tmp_path: Path, document: dict[str, Any]) -> None:
    labels = torch.arange(30)
    names = [f"a class with a long name {i}" for i in range(30)]
    path = tmp_path / "report.html"
    confusions = {"linear/image": page.confusion(labels, labels, names)}
    path.write_text(html.render(document, {"left_out": [], "confusion": confusions}), encoding="utf-8")
    browser.open(path, 390)
    assert browser.ask("document.documentElement.scrollWidth") <= 390
    assert browser.ask("document.querySelector('.scroll').scrollWidth") > 390
