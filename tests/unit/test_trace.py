# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect trace` without a server and a browser: token texts, marks, what the page holds, errors."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import traces
from tokenizers import Tokenizer

from sglang_tokenselect import cli
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.needle import checkpoint_path
from sglang_tokenselect.recording.options import ServerOptions
from sglang_tokenselect.recording.recording import Recording
from sglang_tokenselect.recording.session import recording_server
from sglang_tokenselect.trace import command, page, prompts
from sglang_tokenselect.trace.options import DEFAULT_TOKENS, TraceOptions
from sglang_tokenselect.trace.page import pack_row, render
from sglang_tokenselect.trace.pieces import Mark, find_marks, token_texts
from sglang_tokenselect.trace.steps import Row, Step


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))


def texts_of(tokenizer, text):
    return token_texts(tokenizer.encode(text).ids, tokenizer.decode)


# ---- texts of tokens


@pytest.mark.parametrize("text", ["The sailor sang.\n", "café 🙂 </script>", "\n\n  x", "\ufffd" * 12 + "!", "字🙂🙂"])
def test_texts_join_to_the_text(tokenizer, text):
    texts = texts_of(tokenizer, text)
    assert "".join(texts) == text
    assert len(texts) == len(tokenizer.encode(text).ids)


def test_the_first_token_of_a_character_has_it(tokenizer):
    assert texts_of(tokenizer, "é🙂.") == ["é", "", "🙂", "", "", "", "."]


def test_what_no_tokens_complete_is_shown_where_it_stands(tokenizer):
    """Also where the text itself has the sign of incomplete characters."""
    texts = texts_of(tokenizer, "\ufffd" * 12 + "!")
    assert len([text for text in texts if text]) > 4


def test_a_character_that_is_cut_off_is_shown_as_incomplete(tokenizer):
    ids = tokenizer.encode("a🙂").ids
    assert token_texts(ids[:-1], tokenizer.decode) == ["a", "\ufffd", "", ""]


def test_spaces_that_a_decoder_drops_at_its_begin_are_kept():
    def decode(ids):  # as SentencePiece's: a space before each word but the first
        return " ".join(["the", "old", "sailor"][i] for i in ids)

    assert token_texts([0, 1, 2], decode) == ["the", " old", " sailor"]


# ---- marks


def test_marks_are_all_places_of_a_text():
    texts = ["One", " of", " them", ":", " 42", ".", " One", " of", " us"]
    assert find_marks(texts, "One of") == [Mark("One of", 0, 2), Mark("One of", 6, 8)]
    assert find_marks(texts, "them: 4") == [Mark("them: 4", 2, 5)]
    assert find_marks(texts, "nobody") == []


def test_a_mark_holds_all_tokens_of_its_characters():
    assert find_marks(["a", "🙂", "", "", "b"], "🙂") == [Mark("🙂", 1, 4)]
    assert find_marks(["a", "🙂", "", ""], "a") == [Mark("a", 0, 1)]


def test_the_default_prompt_marks_what_it_asks_for(tokenizer):
    prompt = prompts.needle_question(checkpoint_path(), None)
    texts = texts_of(tokenizer, prompt.text)
    marks = command.all_marks(texts, prompt.marked)
    assert 8000 < len(texts) < prompts.NEEDLE_LENGTH
    assert len(marks) == 2 and marks[0].start < marks[1].start
    for mark in marks:
        key = mark.label.split(" for ")[1].split(":")[0]
        assert "".join(texts[mark.start : mark.end]).strip() == mark.label
        assert key in prompt.title


# ---- the page


def test_steps_are_recordings_without_padding():
    attended = np.array([[0, 5, 9, -1], [-1, -1, -1, -1], [2, 3, 4, 9]], np.int32)
    weights = np.array([[0.5, 0.25, 1, 0], [0, 0, 0, 0], [0, 0.125, 0, 1]], np.float16)
    measures = np.zeros((3, 1, 2), np.float32)
    step = Step.of_recording(
        Recording(10, 3, np.array([0, 1, 5]), attended, weights, np.array([4]), measures, measures, measures)
    )
    assert (step.seq_len, step.layers) == (10, (0, 1, 5))
    assert step.rows[0].positions.tolist() == [0, 5, 9] and step.rows[0].weights.tolist() == [0.5, 0.25, 1]
    assert step.rows[1] is None
    assert step.rows[2].positions.tolist() == [2, 3, 4, 9]


def any_row(seed):
    """Gaps of one, two and three bytes, and float16 of all sizes."""
    rng = np.random.default_rng(seed)
    gaps = rng.choice([1, 2, 127, 128, 129, 16384, 16385, 40000], 50)
    weights = np.array([0.0, 2**-24, 2**-15, 2**-14, 1 / 3, 0.9995, 1.0] * 7 + [0.1], np.float16)
    return Row(np.cumsum(gaps) - rng.integers(0, 2), rng.permutation(weights))


@pytest.mark.parametrize("seed", range(3))
def test_rows_come_back_as_they_were_packed(seed):
    row = any_row(seed)
    decoded = traces.read_row(b"ab" + pack_row(row), (2, 50))
    assert list(decoded) == row.positions.tolist() and list(decoded.values()) == row.weights.tolist()


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_pages_decoder_reads_packed_rows():
    row = any_row(7)
    code = (page.FOLDER / "decode.js").read_text()
    code += f"const row = decodeRow(Uint8Array.from({list(pack_row(row))}), [0, 50]);"
    code += "console.log(JSON.stringify([[...row.positions], [...row.weights]]))"
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [row.positions.tolist(), row.weights.tolist()]


def test_a_page_holds_the_trace(tmp_path):
    trace, file = traces.small_trace(), tmp_path / "page.html"
    file.write_text(render(trace), encoding="utf-8")
    held = traces.read_page(file)
    assert held.facts["texts"] == trace.texts and held.facts["layers"] == [0, 2]
    assert [step["seqLen"] for step in held.facts["steps"]] == [301, 302, 303]
    assert held.rows[2][1] is None
    assert held.rows[0][1][50] == 0.75 and held.rows[1][0][103] == 0.9375
    assert list(held.rows[1][1]) == [*range(4), 210, *range(294, 302)]


class Tags(HTMLParser):
    """Start tags with their attributes, and the text of <title>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.title = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "title":
            self.title += data


def test_no_text_becomes_markup():
    trace = traces.small_trace()
    tags = Tags(render(trace))
    plain = Tags(render(replace(trace, texts=["w"] * len(trace.texts), title="t", marks=[])))
    assert tags.tags == plain.tags
    assert tags.title.startswith("a </title> <b> - ")


def test_a_page_asks_for_nothing_from_elsewhere():
    text = render(traces.small_trace())
    assert "default-src 'none'" in text
    assert not [tag for tag, attrs in Tags(text).tags if "src" in attrs or "href" in attrs]


def test_a_long_trace_is_a_page_of_a_few_megabytes():
    """A tenth of 32 steps of 32 layers about 131,072 tokens: the whole has 12.4 MB."""
    rng = np.random.default_rng(0)
    rows = tuple(Row(np.sort(rng.choice(131072, 2688, replace=False)), np.zeros(2688, np.float16)) for _ in range(102))
    step = Step(131073, tuple(range(102)), rows)
    trace = replace(traces.small_trace(), steps=[step], marks=[])
    assert len(render(trace)) < 1.3e6


# ---- the command


def options(tmp_path, **changes):
    return TraceOptions(out=tmp_path / "page.html", **changes)


def test_flags_of_the_server_stand_behind_two_dashes():
    args = cli.build_parser().parse_args(["trace", "--out", "a.html", "--tokens", "9", "--", "--device", "cpu"])
    assert TraceOptions.of(args).num_tokens == 9
    assert TraceOptions.of(args).server == ServerOptions(None, "cpu", ("--device", "cpu"))
    assert TraceOptions.of(cli.build_parser().parse_args(["trace", "--out", "a.html"])).server == ServerOptions()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [(("trace",), "--out"), (("trace", "--out", "a", "--tokens", "1"), "expected an integer from 2 to 1024, got '1'")],
)
def test_bad_options_are_refused(argv, expected, capsys):
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(argv)
    assert expected in capsys.readouterr().err


def test_a_prompt_file_is_sent_as_it_is(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("a needle.\n", encoding="utf-8")
    prompt = command.choose_prompt(options(tmp_path, prompt=file, mark="needle", num_tokens=5))
    assert prompt == prompts.Prompt("prompt.txt", "a needle.\n", 5, ("needle",))
    assert prompts.from_file(file, None, None).num_tokens == DEFAULT_TOKENS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": ServerOptions("m")}, "--prompt: expected a file, since a model was given, got none"),
        ({"mark": "x"}, "--mark: expected --prompt with it, got --mark 'x' alone"),
        ({"prompt": "prompt.txt", "mark": "y"}, "--mark: expected a text that is in the prompt, got 'y'"),
        ({"prompt": "prompt.txt", "mark": ""}, "--mark: expected a text that is in the prompt, got ''"),
        ({"prompt": "none.txt"}, "--prompt: expected a text file, got .*none.txt"),
        ({"prompt": "binary"}, "--prompt: expected a text file, got .*decode"),
    ],
)
def test_what_cannot_be_asked_is_told_before_a_server_starts(changes, message, tmp_path):
    (tmp_path / "prompt.txt").write_text("a needle")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    if "prompt" in changes:
        changes = changes | {"prompt": tmp_path / changes["prompt"]}
    with pytest.raises(SystemExit, match=message):
        command.choose_prompt(options(tmp_path, **changes))


@pytest.mark.parametrize("name", ["nowhere/page.html", "."])
def test_a_page_needs_a_folder(tmp_path, name):
    with pytest.raises(SystemExit, match=f"--out: expected a file in a folder that exists, got '{tmp_path / name}'"):
        command.run_trace(TraceOptions(out=tmp_path / name))


def test_a_model_needs_a_tokenizer(tmp_path):
    (tmp_path / "prompt.txt").write_text("a needle")
    with pytest.raises(SystemExit, match=f"--model-path: expected a model with a tokenizer, got '{tmp_path}': "):
        command.run_trace(options(tmp_path, prompt=tmp_path / "prompt.txt", server=ServerOptions(str(tmp_path))))


# ---- the server that `trace` and `fidelity` ask


def server_options(*argv):
    return ServerOptions.of(cli.build_parser().parse_args(["trace", "--out", "a.html", *argv]))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_shipped_checkpoint_is_served_on_either_device(tmp_path, device):
    options = server_options("--device", device, "--", "--tokenselect-sink", "7", "--tokenselect-record", "elsewhere")
    flags = recording_server(options, tmp_path, ("--tokenselect-sink", "5", "--tokenselect-min-len", "0")).command
    values = dict(zip(flags, flags[1:], strict=False))  # the last of each flag, which wins
    assert (values["--device"], values["--model-path"]) == (device, str(checkpoint_path()))
    assert (values["--tokenselect-min-len"], values["--tokenselect-sink"]) == ("0", "7")
    assert values["--tokenselect-record"] == str(tmp_path)


def test_another_model_is_served_with_its_own_flags(tmp_path):
    options = server_options("--model-path", "m", "--", "--dtype", "half")
    flags = recording_server(options, tmp_path, ("--tokenselect-min-len", "0")).command
    assert {"m", "half", "--tokenselect-record"} < set(flags) and not {"--device", "--tokenselect-min-len"} & set(flags)
    with pytest.raises(SystemExit, match="--device: expected none beside --model-path but behind --, got cuda"):
        server_options("--model-path", "m", "--device", "cuda")


def reply(*steps, num_prompt_tokens=300):
    config = TokenSelectConfig(sink=64, budget=448, local=128, min_len=0)
    return command.Reply([0] * num_prompt_tokens, [1, 2], "yes", config, steps)


def test_a_prompt_that_nothing_selects_from_is_told_with_the_least_length():
    """Layer 1 has a sliding window, which is never all tokens."""
    last = Step(640, (0, 1), (None, traces.row({}, 640)))
    with pytest.raises(SystemExit, match="prompt: expected at least 640 tokens, got 300"):
        command.check_selects(reply(last))
    command.check_selects(reply(last, Step(641, (0, 1), (traces.row({}, 641),) * 2)))


def test_an_answer_of_one_token_is_told():
    with pytest.raises(SystemExit, match="answer: expected at least 2 tokens"):
        command.check_selects(reply())
