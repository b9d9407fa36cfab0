"""The diffs of published examples: how much they change, and that the page shows them as they are.

`tests/published` applies and runs them.
"""

import re

import pytest
from pages import PAGES, ROOT, read

DIFFS = {path.stem: path.read_text() for path in (ROOT / "examples/diffs").glob("*.diff")}
PAGE = "docs/published_examples.md"


@pytest.mark.parametrize("name", DIFFS)
def test_no_diff_changes_more_than_ten_lines(name):
    """And it holds no more of other people's code than its hunks need to be found."""
    head, *hunks = re.split(r"^@@ .* @@\n", DIFFS[name], flags=re.M)
    assert re.fullmatch(r"Of .*\.\n--- a/(.*)\n\+\+\+ b/\1\n", head)
    lines = [line for hunk in hunks for line in hunk.splitlines()]
    signs = [line[:1] or " " for line in lines]
    assert 0 < signs.count("-") <= signs.count("+") <= 10
    assert signs.count(" ") <= 3 * len(hunks)


def test_the_page_shows_every_diff_as_it_is():
    shown = {page: re.findall(r"^````diff\n(.*?)^````$", read(page), re.M | re.S) for page in PAGES}
    assert sorted(shown.pop(PAGE)) == sorted(DIFFS.values())
    assert not any(shown.values())


@pytest.mark.parametrize("name", DIFFS)
def test_every_diff_is_run(name):
    assert f'"{name}.diff"' in read("tests/published/test_published.py")
