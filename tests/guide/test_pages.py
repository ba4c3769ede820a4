"""``make docs``: every public name and every guide has its place, nothing is warned of, every link leads somewhere."""

import json
import re
import sys

import pytest
from browser import BROWSER, look, widths
from distributed import forking
from documented import GUIDE, GUIDES, ROOT

from raydpo.guide.build import build_pages, guide_text, module_names


def _build(place):
    """In a process that may import everything."""
    try:
        build_pages(place / "docs")
    except Exception as error:
        (place / "problems").write_text(str(error))
        raise
    (place / "names.json").write_text(
        json.dumps({name: list(getattr(sys.modules[name], "__all__", ())) for name in module_names()})
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    pytest.importorskip("pdoc")
    pytest.importorskip("trl")  # a module of raydpo/benchmark imports it
    place = tmp_path_factory.mktemp("docs")
    process = forking().Process(target=_build, args=(place,))
    process.start()
    process.join(300)
    assert process.exitcode == 0, (place / "problems").read_text() if (place / "problems").exists() else process.exitcode
    return place / "docs"


def page(pages, name):
    return pages / f"{name.replace('.', '/')}.html"


def test_every_public_name_has_a_place(pages):
    public = json.loads((pages.parent / "names.json").read_text())
    assert len(public) > 140
    for name, names in public.items():
        text = page(pages, name).read_text()
        assert set(names) <= set(re.findall(r'id="([^"]+)"', text)), name
        assert "PydanticUndefined" not in text and "Annotated[" not in text and " at 0x" not in text, name


def test_every_link_leads_somewhere(pages):
    for file in pages.rglob("*.html"):
        for link in re.findall(r'href="([^"]+)"', file.read_text()):
            if re.match(r"https?:|#|data:|\$\{", link):
                continue
            target, _, anchor = link.partition("#")
            there = (file.parent / target).resolve()
            assert there.is_file(), f"{file}: {link}"
            assert not anchor or f'id="{anchor}"' in there.read_text(), f"{file}: {link}"
        for picture in re.findall(r'<img [^>]*src="(?!data:)([^"]+)"', file.read_text()):
            assert (file.parent / picture).is_file(), f"{file}: {picture}"


def test_links_of_a_guide_page_lead_to_web_pages(tmp_path, monkeypatch):
    page = GUIDE["index"].parent / "data.md"
    broken = []
    assert "[raydpo/config/filter.py](../config/filter.html)" in guide_text(page, broken)
    index = guide_text(GUIDE["index"], broken)
    assert "[sweeps.md](guide/sweeps.html)" in index and "[raydpo/config](config.html)" in index and not broken
    monkeypatch.setattr("raydpo.guide.build.GUIDE", tmp_path)
    (tmp_path / "x.md").write_text("[gone](gone.md) [jobs](../jobs) ![a](a.svg) [web](https://example.org)")
    assert guide_text(tmp_path / "x.md", broken) == "gone jobs ![a](a.svg) [web](https://example.org)"
    assert broken == ["x.md: there is no file gone.md", "x.md: there is no file ../jobs"]


def test_the_guides_are_there(pages):
    for guide in GUIDES:
        text = page(pages, "raydpo.guide" if guide.stem == "index" else f"raydpo.guide.{guide.stem}").read_text()
        title = guide.read_text().splitlines()[0].removeprefix("# ")
        tables = len(re.findall(r"^\| --- ", guide.read_text(), re.MULTILINE))
        assert title in text and text.count("<table>") == tables and "| --- |" not in text
        assert f"guide/{guide.stem}.html" in page(pages, "raydpo.guide").read_text() or guide.stem == "index"
    assert "raydpo/guide.html" in page(pages, "raydpo").read_text()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_a_browser_shows_them_without_complaint(pages):
    _, complaints = look(page(pages, "raydpo.guide.troubleshooting"))
    assert complaints == []
    content, window = widths(page(pages, "raydpo.guide.switching"), 1000)
    assert content <= window


def test_it_is_packaged():
    """The guides and the template are files of the package."""
    listed = (ROOT / "pyproject.toml").read_text()
    assert all(f'"guide/*.{kind}"' in listed for kind in ("css", "jinja2", "md", "svg"))
