"""The page of an evaluation, read by a parser of HTML."""

import html.parser
import math

from spa_jax.scoring.predictions import Prediction
from spa_jax.scoring.report import Answered, write_report


class Reader(html.parser.HTMLParser):
    """Collects the spans of tokens by their class, and all text, and checks that tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tokens: list[list[str]] = []
        self.text, self._open = "", ["html"]
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "span":
            self.tokens.append([dict(attributes)["class"], ""])
        if tag not in ("meta", "html"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self._open[-1] == "span":
            self.tokens[-1][1] += data


def test_a_page_shows_each_token_by_its_source_and_nothing_as_markup(tmp_path):
    answers = [
        Answered(
            "Is <b>1 & 2</b>?", ["yes", "<i>"], Prediction("3.1", "0", "a <x>", "cdc", {"f1": 50.0}, ["a", " <x>", ""])
        ),
        Answered("old", ["no"], Prediction("4", "0", "whole text", "cd", {"f1": 0.0}), is_cut=True),
    ]
    summary = {"score/f1": [25.0, -math.inf, math.inf], "data/questions": 2, "loss/base": 1.5, "evaluation": {}}
    write_report(tmp_path / "page.html", "SciQ & more", {"backbone": "a <b>"}, summary, answers, ["few & <odd> rows"])
    page = (tmp_path / "page.html").read_text()
    assert "http" not in page
    read = Reader(page)
    assert read.tokens[2:] == [["c", "a"], ["d", " <x>"], ["c", ""], ["", "whole text"]]
    for said in (
        "Is <b>1 & 2</b>?",
        "<i>",
        "SciQ & more",
        "25.00",
        "1.500",
        "f1 50.0",
        "cut at 2 tokens",
        "a <b>",
        "few & <odd> rows",
    ):
        assert said in read.text
    assert "inf" not in read.text
    assert read.text.count("cut at") == 1


def test_the_name_of_a_file_need_not_be_text(tmp_path):
    write_report(tmp_path / "report.html", "rows\udcff.jsonl, spa", {}, {}, [])
    assert "rows\\udcff.jsonl" in Reader((tmp_path / "report.html").read_text(encoding="utf-8")).text
