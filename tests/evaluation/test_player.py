import html.parser
import json
import re
import shutil
import subprocess

import pytest

from dmax_jax.decoding.batch import Answer, Step
from dmax_jax.decoding.policies import SpdPolicy, ThresholdPolicy
from dmax_jax.evaluation.player import Cell, Run, frames, page
from tests.conftest import GOLDEN

MASK, EOS = 9, 8
TEXTS = {1: "Two", 2: " and", 3: " ", 4: "\n", 5: " é</script>", 6: "5", 7: "", EOS: ""}
HOSTILE = "</script><script>document.body.textContent = 'taken over'</script> <!-- & \u2028 ]]>"


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join(TEXTS[token] for token in ids)


def traced(prompt_length: int, token_ids: list[int], *steps: tuple[int, int, list[int], list[float]]) -> Answer:
    trace = [Step(block, step, tokens, False, confidences) for block, step, tokens, confidences in steps]
    count = token_ids.index(EOS) if EOS in token_ids else len(token_ids)
    return Answer([0] * prompt_length, token_ids, count, len(trace), 1.0, trace)


# Blocks of 4; the prompt ends in the middle of block 1, and block 3 is not needed.
SOFT = traced(
    6, [1, 2, 3, 5, 6, EOS, EOS, EOS, EOS, EOS],
    (1, 0, [0, 0, 6, MASK], [0.1, 0.1, 0.61, 0.2]),
    (1, 1, [0, 0, 1, 2], [0.1, 0.1, 0.7, 0.8]),
    (1, 2, [0, 0, 1, 2], [0.1, 0.1, 0.9, 0.95]),
    (2, 0, [3, 5, 4, MASK], [0.5, 0.5, 0.5, 0.5]),
    (2, 1, [3, 5, MASK, MASK], [0.9, 0.6, 0.5, 0.5]),
    (2, 2, [3, 5, 6, EOS], [0.9, 0.9, 0.9, 0.3]),
)  # fmt: skip
HARD = traced(
    6, [1, 2, 6, 7, 3, 4, EOS, EOS, EOS, EOS],
    (1, 0, [0, 0, MASK, 2], [0.1, 0.1, 0.4, 0.96]),
    (1, 1, [0, 0, 1, 2], [0.1, 0.1, 0.97, 0.05]),
    (2, 0, [6, 7, 3, 4], [1.0, 1.0, 1.0, 0.99]),
    (3, 0, [EOS, EOS, EOS, EOS], [1.0, 1.0, 1.0, 1.0]),
)  # fmt: skip
OPEN = Cell(MASK, "masked", "", None)


def test_soft_positions_are_promoted_revised_and_final_when_their_block_has_ended():
    played = frames(SOFT, SpdPolicy(), mask_id=MASK, eos_id=EOS)
    assert played[0] == (0, 0, 0, 0, (OPEN,) * 10)
    assert [frame[:4] for frame in played[1:]] == [
        (1, 0, 1, 1), (2, 0, 2, 2), (3, 0, 3, 2), (4, 1, 1, 5), (5, 1, 2, 4), (6, 1, 3, 5)
    ]  # fmt: skip
    assert played[1].cells[:2] == (Cell(6, "soft", "promoted", 0.61), OPEN)
    assert played[2].cells[:2] == (Cell(1, "soft", "revised", 0.7), Cell(2, "soft", "promoted", 0.8))
    assert played[3].cells[:2] == (Cell(1, "final", "", 0.9), Cell(2, "final", "", 0.95))
    assert played[4].cells[4:] == (Cell(4, "soft", "promoted", 0.5), *[OPEN] * 5)
    assert played[5].cells[3:6] == (Cell(5, "soft", "", 0.6), Cell(MASK, "masked", "revised", None), OPEN)
    last = played[6].cells
    assert last[4:6] == (Cell(6, "final", "promoted", 0.9), Cell(EOS, "final", "promoted", 0.3))
    assert last[6:] == (Cell(EOS, "final", "", None),) * 4


def test_committed_tokens_are_final_and_keep_the_confidence_that_they_were_committed_with():
    played = frames(HARD, ThresholdPolicy(), mask_id=MASK, eos_id=EOS)
    assert played[1].cells[:2] == (OPEN, Cell(2, "final", "promoted", 0.96))
    assert played[2].cells[:2] == (Cell(1, "final", "promoted", 0.97), Cell(2, "final", "", 0.96))
    assert [frame.tokens for frame in played] == [0, 1, 2, 6, 6]


@pytest.mark.parametrize("name", ["tiny", "grouped", "calm"])
def test_the_frames_of_the_official_codes_traces_end_in_its_answers(name):
    golden = json.loads((GOLDEN / name / "decode.json").read_text())
    cases = [case for case in golden["cases"] if case["method"] == "spd"]
    changes = set()
    for case in cases:
        eos_id, start = case.get("eos_id", golden["eos_id"]), len(case["prompt"])
        trace = [Step(s["block"], s["step"], s["tokens"], s["stop"], [0.5] * len(s["tokens"])) for s in case["trace"]]
        token_ids = case["tokens"][start:]
        count = token_ids.index(eos_id) if eos_id in token_ids else len(token_ids)
        answer = Answer(case["prompt"], token_ids, count, case["forwards"], 1.0, trace)
        played = frames(answer, SpdPolicy(), mask_id=golden["mask_id"], eos_id=eos_id)
        assert [cell.token_id for cell in played[-1].cells] == token_ids
        assert (played[-1].forwards, played[-1].tokens) == (answer.forwards, answer.generated_tokens)
        assert all((c.state == "masked") == (c.token_id == golden["mask_id"]) for c in played[-1].cells)
        assert "soft" not in {cell.state for cell in played[-1].cells}
        changes |= {cell.change for frame in played for cell in frame.cells}
    assert len(cases) >= 10
    assert changes == {"", "promoted", "revised"}


class Page(html.parser.HTMLParser):
    """What a reader of the page sees: each run's words, and its chips with class, title and text."""

    def __init__(self, source: str):
        super().__init__()
        self.scripts, self.runs, self.within = [], [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        classes = (attrs.get("class") or "").split()
        if tag == "script":
            self.scripts.append("")
            self.within = "script"
        elif tag == "article":
            self.runs.append({"words": "", "chips": []})
            self.within = "run"
        elif self.runs and tag == "p" and "cells" in classes:
            self.within = "cells"
        elif self.within == "cells" and "t" in classes:
            self.runs[-1]["chips"].append({**attrs, "class": classes, "text": ""})

    def handle_endtag(self, tag):
        if tag in ("script", "article"):
            self.within = ""
        elif tag == "p" and self.within == "cells":
            self.within = "run"

    def handle_data(self, data):
        if self.within == "script":
            self.scripts[-1] += data
        elif self.within == "run":
            self.runs[-1]["words"] += f"{data}|"
        elif self.within == "cells":
            self.runs[-1]["chips"][-1]["text"] += data

    def text(self, run: int) -> str:
        return "".join(chip["text"] for chip in self.runs[run]["chips"])


def both(tokenizer=None) -> str:
    tokenizer = tokenizer or Letters()
    soft = Run("spd", "trained", SpdPolicy(), [SOFT, HARD], tokenizer, MASK, EOS)
    hard = Run("threshold", "base", ThresholdPolicy(threshold=0.9), [HARD, HARD], tokenizer, MASK, EOS)
    return page([HOSTILE, "second"], [soft, hard])


def test_texts_cannot_leave_the_data():
    source = Page(both())
    assert len(source.scripts) == 2
    assert [shown["prompt"] for shown in json.loads(source.scripts[0])] == [HOSTILE, "second"]


def test_nothing_is_loaded_from_elsewhere():
    assert re.search(r"https?:|src=|url\(|@import|<link", both()) is None
    assert len(both()) < 40_000


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Opens a page in Chromium, without a screen, and returns what it shows after a minute of its own time."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the PATH")
    folder = tmp_path_factory.mktemp("browser")

    def open_page(source: str, fragment: str) -> Page:
        (folder / "page.html").write_text(source, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
        address = f"{(folder / 'page.html').as_uri()}#{fragment}"
        command = [browser, *options, "--virtual-time-budget=60000", "--dump-dom", address]
        return Page(subprocess.run(command, capture_output=True, check=True, timeout=120, encoding="utf-8").stdout)

    return open_page


def with_keys(source: str, *keys: str) -> str:
    """The page as if somebody pressed these keys."""
    pressed = "".join(
        f"document.body.dispatchEvent(new KeyboardEvent('keydown', {{key: '{k}', bubbles: true}}));" for k in keys
    )
    return source.replace("</body>", f"<script>{pressed}</script></body>")


def test_it_plays_to_the_end_and_the_last_frame_is_the_answer(browse):
    seen = browse(both(), "play")
    assert [seen.text(run) for run in (0, 1)] == [Letters().decode(SOFT.answer_ids), Letters().decode(HARD.answer_ids)]
    assert "✓ done after 6 forwards|" in seen.runs[0]["words"]
    assert "✓ done after 4 forwards|" in seen.runs[1]["words"]
    assert "forwards|6|tokens decoded|5|tokens per forward|0.71|block|2 / 3|step in block|3|" in seen.runs[0]["words"]
    assert "forwards|4|tokens decoded|6|tokens per forward|1.20|block|3 / 3|step in block|1|" in seen.runs[1]["words"]
    assert "Block 3 |not needed" in seen.runs[0]["words"]


@pytest.mark.parametrize("keys", [["Home", "ArrowRight", "ArrowRight"], ["End", *["ArrowLeft"] * 4]])
def test_marks_of_a_frame_and_the_keys_that_lead_to_it(keys, browse):
    seen = browse(with_keys(both(), *keys), "frame=5")
    soft, hard = (run["chips"] for run in seen.runs)
    assert soft[0]["class"] == ["t", "soft", "revised", "c3"]
    assert (soft[0]["text"], soft[0]["data-was"]) == ("Two", "5")
    assert soft[0]["title"] == "Position 1: soft, 70 % sure, revised in this forward: it was “5”"
    assert soft[1]["class"] == ["t", "soft", "promoted", "c4"]
    assert (soft[2]["class"], soft[2]["text"]) == (["t", "masked"], "")
    assert hard[1]["class"] == ["t", "final"]
    assert "block|1 / 3|step in block|2|" in seen.runs[0]["words"]
    assert "done" not in seen.runs[0]["words"]


def test_space_plays_the_chosen_prompt_and_ids_stand_in_for_a_missing_tokenizer(browse):
    ids_alone = [Run("spd", "trained", SpdPolicy(), [HARD, SOFT], None, MASK, EOS)]
    seen = browse(with_keys(page(["first", "second"], ids_alone), " "), "prompt=2&speed=8")
    assert seen.text(0).split() == [str(token) for token in SOFT.token_ids]
    assert "done after 6 forwards" in seen.runs[0]["words"]
