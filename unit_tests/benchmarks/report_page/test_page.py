"""Plots stand under their headings with their origin; a result of another form does not stop the others."""

from html.parser import HTMLParser

from benchmarks.report_page.page import plot_results, render
from benchmarks.report_page.results import Result

GOOD = Result(
    "good.json", "lossless", {"results": [{"dtype": "float32", "share": 0.25, "note": None}], "commit": "abc"}
)
TURNS = [{"model": "demo", "turn": turn, "ttft_on_ms": 1.0, "ttft_off_ms": 2.0 * turn} for turn in (1, 2)]
CHAT = Result("chat.json", "multi_turn", {"results": {"turns": TURNS}, "command": "python -m <x>"})
BAD = Result("bad.json", "multi_turn", {"results": {"turns": [{"model": "demo"}]}})
NOTHING = Result("nothing.json", "unheard", {"results": 3})


class Tags(HTMLParser):
    """Open tags must be closed in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """Closes itself."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_headings_plots_and_what_was_skipped_are_on_the_page() -> None:
    plots, skipped = plot_results([GOOD, BAD, CHAT, NOTHING])
    assert [result.name for _, result, _ in plots] == ["good.json", "chat.json"]
    assert [line.split(":")[0] for line in skipped] == ["bad.json", "nothing.json"]
    page = render(plots, [*skipped, "<b>"])
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    order = [
        page.index(text) for text in ("Prefix cache", "<svg", "python -m &lt;x&gt;", "Others", "commit abc", "Skipped")
    ]
    assert order == sorted(order) and "<h2>Throughput" not in page
    assert "<td>0.25</td>" in page and "<td>-</td>" in page and "<li>&lt;b&gt;</li>" in page


def test_a_page_without_skipped_files_does_not_mention_any() -> None:
    plots, skipped = plot_results([CHAT])
    assert not skipped and "Skipped" not in render(plots, skipped)
