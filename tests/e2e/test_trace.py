# SPDX-License-Identifier: Apache-2.0
"""The trace page in a browser, and the command that makes it with a real server."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser

import pytest
import traces
from traces import EMOJI, LOCAL, SINK

from sglang_tokenselect.trace.page import render

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SWITCHES = ("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--window-size=1400,2400")


@dataclass
class Element:
    """Of a page after its script: its own attributes, and all text in it."""

    tag: str
    attributes: dict[str, str | None]
    text: str = ""

    @property
    def names(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    @property
    def tokens(self) -> range:
        return range(int(self.attributes["data-start"]), int(self.attributes["data-end"]))


@dataclass
class Dom(HTMLParser):
    """What the browser made of a page."""

    source: str
    elements: list[Element] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()
        self._open: list[Element] = []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append(Element(tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self._open.pop().tag == tag

    def handle_data(self, data):
        for element in self._open:
            element.text += data

    def by_id(self, name: str) -> Element:
        return next(element for element in self.elements if element.attributes.get("id") == name)

    def of_class(self, name: str) -> list[Element]:
        """Of the text alone, not of the legend."""
        return [e for e in self.elements if name in e.names and "data-start" in e.attributes]

    def weights(self) -> dict[range, str]:
        """Of the voted tokens."""
        return {e.tokens: e.attributes["title"].split("weight ")[1] for e in self.of_class("voted")}

    @property
    def state(self) -> tuple[str, str, str]:
        body = next(e for e in self.elements if e.tag == "body")
        return tuple(body.attributes[f"data-{name}"] for name in ("step", "layer", "found"))

    @property
    def status(self) -> str:
        return self.by_id("status").text


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Opens a page in a browser: (file, hash) to what it shows. A page with an error in its script fails."""
    if CHROMIUM is None and "CI" not in os.environ:
        pytest.skip("needs chromium")
    assert CHROMIUM, "expected chromium in $PATH, got none"
    profile = tmp_path_factory.mktemp("profile")

    def browse(file, where="", *switches):
        command = [CHROMIUM, *SWITCHES, f"--user-data-dir={profile}", *(switches or ["--dump-dom"])]
        done = subprocess.run([*command, f"file://{file}#{where}"], capture_output=True, text=True, timeout=60)
        if switches:
            return None
        dom = Dom(done.stdout)
        assert dom.by_id("errors").text == "" and "hidden" in dom.by_id("errors").attributes
        return dom

    return browse


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "small page.html"
    file.write_text(render(traces.small_trace()), encoding="utf-8")
    return file


def test_attended_tokens_are_highlighted_as_recorded(browse, small):
    dom = browse(small, "step=0&layer=2")
    assert dom.weights() == {range(50, 51): "0.75", range(60, 61): "0.13", range(200, 201): "<0.001"}
    fixed = [token for element in dom.of_class("fixed") for token in element.tokens]
    assert fixed == [*range(SINK), *range(301 - LOCAL, 301)]
    assert "Attends to 15 of 301 tokens (5.0%) in layer 2." in dom.status
    assert "Reading  the, token 300: writes ⏎" in dom.status
    [reading], [writing] = dom.of_class("reading"), dom.of_class("writing")
    assert (reading.tokens, writing.tokens) == (range(300, 301), range(301, 302))
    assert [e.tokens for e in dom.of_class("future")] == [range(302, 304)]


def test_the_text_is_whole(browse, small):
    dom = browse(small)
    chunks = [e for e in dom.elements if "chunk" in e.names]
    labels = [0, EMOJI, EMOJI + 128]
    assert len(chunks) == len(labels)
    text = "".join(e.text.removeprefix(str(label)) for e, label in zip(chunks, labels, strict=True))
    assert text == "".join(traces.small_trace().texts)
    assert len([e for e in dom.elements if e.tag == "script"]) == 2


def test_the_needle_is_told_where_it_is_attended(browse, small):
    found, missed = browse(small, "step=1&layer=0"), browse(small, "step=0&layer=0")
    assert found.state == ("1", "0", "1") and missed.state == ("0", "0", "0")
    assert "Marked text: attended in 1 of 1 places, weight up to 0.94." in found.status
    assert "Marked text: not attended." in missed.status
    assert found.by_id("marks").text == "0.94<b>needle</b>: 421 of 6 tokens"
    bars = [e.attributes["style"] for e in found.elements if "--share" in (e.attributes.get("style") or "")]
    assert bars == [f"--share: {weight};" for weight in (0, 0.9375, 0, 0.9375, 0.9375, 0)]  # steps, all layers, layers
    marked = [token for e in missed.of_class("marked") for token in e.tokens]
    assert marked == [*range(100, 106)]


def test_voted_tokens_are_listed_by_weight(browse, small):
    dom = browse(small, "step=1&layer=0")
    places = [e.text for e in dom.elements if "place" in e.names]
    assert places == ["1 of 6 tokens", "103", str(EMOJI + 1), "8"]
    assert dom.by_id("top").text.startswith("0.94100 w101 w102 w103 w104")


def test_tokens_that_share_a_character_are_highlighted_together(browse, small):
    dom = browse(small, "step=1&layer=0")
    assert dom.weights()[range(EMOJI, EMOJI + 3)] == "0.25"
    assert "🙂" in [e.text for e in dom.of_class("voted")]
    assert "<script>alert(1)</script>" in [e.text for e in dom.of_class("voted")]


def test_all_layers_show_the_greatest_weight_of_any(browse, small):
    dom = browse(small, "step=0&layer=all")
    assert dom.weights() == {range(50, 51): "0.75", range(60, 61): "0.50", range(200, 201): "<0.001"}
    assert "Attends to 15 of 301 tokens (5.0%) in any of 2 layers." in dom.status


def test_a_layer_that_attends_to_everything_says_so(browse, small):
    layer, both = browse(small, "step=2&layer=2"), browse(small, "step=2&layer=all")
    assert layer.weights() == {}
    assert "Layer 2 attends to everything; the weights are not recorded." in layer.status
    assert "1 of 2 layers attend to everything" in both.status and list(both.weights()) == [range(250, 251)]


@pytest.mark.parametrize("where", ["", "step=9&layer=7", "step=x", "layer=1", "%", "step=-1"])
def test_an_address_that_names_nothing_shows_the_first_step(browse, small, where):
    assert browse(small, where).state == ("0", "all", "0")


def drive(small, folder, script):
    """A page that does this once it is shown."""
    page, file = small.read_text(encoding="utf-8"), folder / "driven.html"
    script = f"<script>setTimeout(() => {{ {script} }}, 500)</script>"
    file.write_text(page.replace("</body>", f"{script}</body>"), encoding="utf-8")
    return file


def press(key):
    return f'document.dispatchEvent(new KeyboardEvent("keydown", {{key: "{key}"}}));'


@pytest.mark.parametrize(
    ("script", "state"),
    [
        (press("ArrowRight") + press("ArrowDown"), ("1", "0", "1")),
        (press("ArrowRight") * 5, ("2", "all", "0")),
        (press("ArrowRight") * 2 + press("ArrowLeft") + press("ArrowDown") * 5, ("1", "2", "0")),
        (press("ArrowDown") + press("ArrowUp") * 3, ("0", "all", "0")),
        ('byId("steps").children[2].click(); byId("layers").children[1].click();', ("1", "0", "1")),
        ('byId("steps").children[0].click();', ("0", "all", "0")),
    ],
)
def test_keys_and_buttons_choose(browse, small, tmp_path, script, state):
    dom, direct = browse(drive(small, tmp_path, script)), browse(small, f"step={state[0]}&layer={state[1]}")
    assert dom.state == direct.state == state
    assert dom.weights() == direct.weights() and dom.status == direct.status
    pressed = [e.text for e in dom.elements if e.attributes.get("aria-pressed") == "true"]
    assert pressed == [["⏎", "</title>", "é"][int(state[0])], "all layers" if state[1] == "all" else state[1]]


def test_lists_and_the_map_lead_to_their_place(browse, small, tmp_path):
    """A click on a listed token or on the map scrolls the text."""
    script = """
      const pane = byId("text"), places = [];
      pane.style.height = pane.style.maxHeight = "200px";
      byId("top").querySelector("button").click(); places.push(pane.scrollTop);
      const {left, width} = byId("map").getBoundingClientRect();
      const click = (share) => byId("map").dispatchEvent(new MouseEvent("click", {clientX: left + share * width}));
      click(0.95); places.push(pane.scrollTop); click(0); places.push(pane.scrollTop);
      document.body.dataset.places = places.map(Math.round);
    """
    body = next(e for e in browse(drive(small, tmp_path, script), "step=1&layer=0").elements if e.tag == "body")
    listed, late, early = map(int, body.attributes["data-places"].split(","))
    assert 0 == early < listed < late


def test_what_is_scrolled_into_view_is_highlighted(browse, small, tmp_path):
    script = """
      const pane = byId("text");
      pane.style.flex = "none"; pane.style.height = "60px"; byId("follow").checked = false;
      pane.scrollTop = 0;
      show({step: 1, layer: 0});
      document.body.dataset.painted = chunks.map((chunk) => chunk.paintedFor === shown);
      pane.scrollTop = pane.scrollHeight;
      pane.dispatchEvent(new Event("scroll")); // at once, not with the next frame
    """
    dom = browse(drive(small, tmp_path, script))
    body = next(e for e in dom.elements if e.tag == "body")
    assert body.attributes["data-painted"] == "true,false,false"
    assert dom.of_class("reading")[0].tokens == range(301, 302)


def test_the_map_shows_where_voted_tokens_lie(browse, small, tmp_path):
    """Pixels (red, green, blue, alpha) of either layer, and beside them; what is not drawn is transparent."""
    script = """
      const canvas = document.querySelector("#map canvas"), context = canvas.getContext("2d");
      const pixel = (token, y) => [...context.getImageData((token + 0.5) / texts.length * canvas.width, y, 1, 1).data];
      const places = [[103, 12], [103, 25], [110, 12], [210, 25]];
      document.body.dataset.pixels = JSON.stringify(places.map(([x, y]) => pixel(x, y)));
    """
    body = next(e for e in browse(drive(small, tmp_path, script), "step=1&layer=0").elements if e.tag == "body")
    voted, other_layer, beside, other_voted = json.loads(body.attributes["data-pixels"])
    assert voted[3] > 200 and voted[2] < 60
    assert other_layer[3] == beside[3] == 0
    assert 0 < other_voted[3] < voted[3]


def test_a_picture_can_be_taken(browse, small, tmp_path):
    picture = tmp_path / "page.png"
    browse(small, "step=1&layer=0", f"--screenshot={picture}")
    data = picture.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (1400, 2400) and len(data) > 20_000


def test_the_command_shows_how_the_needles_are_found(browse, tmp_path):
    """With the shipped checkpoint. Selections are made anew in each step, and the sink is shorter than usual."""
    out = tmp_path / "trace.html"
    command = [sys.executable, "-m", "sglang_tokenselect.cli", "trace", "--out", str(out), "--"]
    flags = ("--tokenselect-theta", "2", "--tokenselect-sink", "32")
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and f"{out}: 7 steps about 8,129 tokens" in done.stdout
    page = traces.read_page(out)
    texts, answer = page.facts["texts"], "".join(page.facts["texts"][page.facts["promptTokens"] :])
    assert f"answer: {answer.strip()}\n" in done.stdout
    assert (page.facts["sink"], page.facts["local"]) == (32, 128)
    for step, rows in zip(page.facts["steps"], page.rows, strict=True):
        assert all(len(row) == 32 + 448 + 128 for row in rows)
        assert all({*range(32), *range(step["seqLen"] - 128, step["seqLen"])} < row.keys() for row in rows)
    for mark in page.facts["marks"]:
        key, number = "".join(texts[mark["start"] : mark["end"]]).strip(" .").split(" for ")[1].split(": ")
        assert f"{key}: {number}" in answer
        # The step that writes the number's second half reads the first and attends to the second.
        place = next(p for p in range(mark["start"], mark["end"]) if texts[p] == number[3:])
        step = texts.index(number[3:], page.facts["promptTokens"]) - page.facts["promptTokens"] - 1
        assert max(row.get(place, 0) for row in page.rows[step]) > 0.5
        dom = browse(out, f"step={step}&layer=all")
        assert dom.weights()[range(place, place + 1)] > "0.5"
        assert "Marked text: attended in " in dom.status
