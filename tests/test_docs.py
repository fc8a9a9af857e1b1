"""The pages: tables come from the records, links resolve, commands are valid, and no page grows."""

import doctest
import re
import shlex
import urllib.parse

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

import rnode
from helpers import ROOT
from rnode.app.cli import expand
from rnode.app.validation import compose_config, validate

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
LINES, README_WORDS, DOCS_WORDS = 90, 650, 9000


@pytest.fixture
def renderer(monkeypatch):
    """scripts/render_docs.py."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import render_docs

    return render_docs


def test_the_tables_are_those_of_the_records(renderer, capsys):
    assert renderer.main(["--check"]) == 0, capsys.readouterr().out


def test_pages_are_rendered_and_a_stale_one_is_found(renderer, tmp_path, monkeypatch):
    monkeypatch.setattr(renderer, "ROOT", tmp_path)
    monkeypatch.setattr(renderer, "RECORDS", tmp_path)
    record = '{"rows": [{"a": "x", "b": "1"}, {"a": "y", "c": "2"}]}'
    (tmp_path / "some.json").write_text(record)
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    marker = "<!-- record: some columns=a|c=sea rows=^y -->\n"
    readme.write_text(f"{marker}|9|\n<!-- end -->\nrest")
    page.write_text("<!-- record: some some -->\n<!-- end -->\nbetween")
    assert renderer.main(["--check"]) == 1
    assert "|9|" in readme.read_text()
    assert renderer.main([]) == 0
    assert renderer.main(["--check"]) == 0
    link = "[record](benchmarks/results/some.json)"
    text = f"|a|sea|\n|---|---|\n|y|2|\n\n<small>{link}</small>\n<!-- end -->\nrest"
    assert readme.read_text() == f"{marker}\n{text}"
    assert page.read_text().splitlines() == [
        *("<!-- record: some some -->", "", "|a|b|c|", "|---|---|---|"),
        *("|x|1||", "|y||2|", "|x|1||", "|y||2|", ""),
        *(f"<small>{link}, {link}</small>".replace("(", "(../"), "<!-- end -->", "between"),
    ]
    readme.write_text("<!-- record: some columns=a|d -->\n<!-- end -->\n")
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
    assert not re.findall(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,12}\b", text)
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / urllib.parse.unquote(path)) if path else page
        assert target.exists(), link
        if anchor:  # as GitHub and MkDocs make them of headings
            headings = re.findall(r"(?m)^#+ (.*)$", target.read_text(encoding="utf-8").lower())
            assert anchor in {re.sub(r"[^\w -]", "", h).replace(" ", "-") for h in headings}, link


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
def test_the_command_of_a_page_is_valid(line):
    command, *arguments = shlex.split(line)
    command = command.removesuffix(".py")
    overrides = [text for text in arguments if text[0] != "-" and text != "job"]
    parsed = OverridesParser.create().parse_overrides(expand(command, overrides))
    fixed = [override.input_line for override in parsed if not override.is_sweep_override()]
    validate(command, compose_config(command, fixed))


def test_the_api_page_has_an_example_that_runs_of_each_public_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    text = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    examples = doctest.DocTestParser().get_doctest(text, {}, "api.md", None, 0)
    assert doctest.DocTestRunner().run(examples).failed == 0
    assert [name for name in rnode.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.slow(reason="trains for twenty seconds")
@pytest.mark.filterwarnings("ignore:.*noise of their unit")
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    assert len(names["density"].sample(7)) == 7
    assert not list(tmp_path.iterdir())
