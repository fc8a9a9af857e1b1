"""The pages: tables come from the records, links resolve, commands compose, and no page grows."""

import importlib.util
import re
import shlex
import urllib.parse

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from helpers import ROOT
from rnode.app.schema import CONF

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
LINES, README_WORDS, DOCS_WORDS = 90, 650, 9000


@pytest.fixture
def renderer(monkeypatch, tmp_path):
    """scripts/render_docs.py for a repository in `tmp_path` with one page and one record."""
    renderer = load_renderer()
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(renderer, "ROOT", tmp_path)
    monkeypatch.setattr(renderer, "RECORDS", tmp_path)
    record = '{"rows": [{"a": "x", "b": "1"}, {"a": "y", "c": "2"}]}'
    (tmp_path / "some.json").write_text(record)
    return renderer


def load_renderer():
    spec = importlib.util.spec_from_file_location("render_docs", ROOT / "scripts/render_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_records(capsys):
    assert load_renderer().main(["--check"]) == 0, capsys.readouterr().out


def test_a_page_is_rendered_and_a_stale_one_is_found(renderer, tmp_path):
    marker = "<!-- record: some columns=a|c=sea rows=^y -->\n"
    page = tmp_path / "README.md"
    page.write_text(f"{marker}|9|\n<!-- end -->\nrest")
    assert renderer.main(["--check"]) == 1
    assert "|9|" in page.read_text()
    assert renderer.main([]) == 0
    link = "<small>[record](benchmarks/results/some.json)</small>"
    assert page.read_text() == (
        f"{marker}\n|a|sea|\n|---|---|\n|y|2|\n\n{link}\n<!-- end -->\nrest"
    )
    assert renderer.main(["--check"]) == 0


def test_tables_of_a_page_of_docs_have_all_columns_and_rows_of_their_records(renderer, tmp_path):
    page = tmp_path / "docs" / "page.md"
    (tmp_path / "README.md").write_text("")
    page.write_text(
        "<!-- record: some some -->\n<!-- end -->\nbetween\n"
        "<!-- record: some columns=b -->\n<!-- end -->\n"
    )
    renderer.main([])
    link = "[record](../benchmarks/results/some.json)"
    rows = ["|x|1||", "|y||2|"]
    assert page.read_text().splitlines() == [
        *("<!-- record: some some -->", "", "|a|b|c|", "|---|---|---|", *rows, *rows),
        *("", f"<small>{link}, {link}</small>", "<!-- end -->", "between"),
        *("<!-- record: some columns=b -->", "", "|b|", "|---|", "|1|", "||"),
        *("", f"<small>{link}</small>", "<!-- end -->"),
    ]


def test_a_column_that_no_row_has_is_an_error(renderer, tmp_path):
    (tmp_path / "README.md").write_text("<!-- record: some columns=a|d -->\n<!-- end -->\n")
    with pytest.raises(KeyError, match="no row has d"):
        renderer.main([])


def words(path):
    """The words of a page that a reader sees: what has a letter or a digit, without comments."""
    text = re.sub(r"<!--.*?-->", "", path.read_text(encoding="utf-8")).replace("|", " ")
    return sum(any(map(str.isalnum, word)) for word in text.split())


def test_the_pages_are_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= LINES
    assert words(README) <= README_WORDS
    assert sum(map(words, DOCS)) <= DOCS_WORDS


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_a_page_names_no_commit_and_its_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    hashes = re.findall(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,12}\b", text)
    assert not hashes
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / urllib.parse.unquote(path)) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands():
    """The lines `rnode COMMAND …` and `python src/COMMAND.py …` of code blocks, once each."""
    lines = set()
    for page in [README, *DOCS]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^ {4}(?:rnode|python src/) ?(.*)$", text, re.MULTILINE):
            arguments = shlex.split(line, comments=True)
            if "--config-dir" not in arguments:  # names files of the reader's
                lines.add(shlex.join(arguments))
    return sorted(lines)


@pytest.mark.parametrize("line", commands())
def test_the_keys_of_a_command_exist(line):
    """Hydra composes the line without paths and flags, and with the first value of a sweep."""
    command, *arguments = shlex.split(line)
    overrides = []
    for text in arguments:
        if "=" not in text or text.startswith(("hydra", "context.")):
            continue
        (override,) = OverridesParser.create().parse_overrides([text])
        key = override.get_key_element()
        if override.is_choice_sweep():
            text = f"{key}={override.value().list[0]}"
        elif override.is_sweep_override():
            text = f"{key}=1"
        overrides.append(text)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose(command.removesuffix(".py"), overrides)
