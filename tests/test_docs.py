"""Names, links and figures in the documentation are right."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from configs.reference import PAGE, page
from configs.run_dir import REPOSITORY

README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
LAYOUT = DOCS / "layout.md"


def links(page: Path) -> set[str]:
    """Return the relative links of a page, including pictures."""
    targets = set(re.findall(r"\]\(([^)\s]+)\)", page.read_text()))
    return {link for link in targets if not re.match(r"[a-z]+:", link)}


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tree() -> list[str]:
    """Return the paths in the layout page's tree, which is indented by two spaces per level; folders end with a slash."""
    folders: list[str] = []
    paths = []
    for line in LAYOUT.read_text().split("```")[1].strip("\n").splitlines():
        name = line.split()[0]
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        paths.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_have_targets(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_index_links_every_page() -> None:
    index = DOCS / "README.md"
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {index.name}
    assert pages <= {link.partition("#")[0] for link in links(index)}


def test_every_picture_is_shown() -> None:
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    assert not {picture.name for picture in DOCS.glob("*.png") if picture not in shown}


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_named_files_exist(page: Path) -> None:
    """Recipes, and scripts in commands."""
    text = page.read_text()
    named = set(re.findall(r"configs/\w+\.yaml", text)) - {"configs/NAME.yaml"}
    named |= set(re.findall(r"(?:python|launch|torchrun[^\n]*?) ((?:stage|pipelines|benchmarks)\S*\.py)", text))
    assert not {name for name in named if not (REPOSITORY / name).exists()}


def test_every_recipe_is_described() -> None:
    text = (DOCS / "recipes.md").read_text()
    assert not {path.name for path in (REPOSITORY / "configs").glob("*.yaml") if f"`configs/{path.name}`" not in text}


def test_figures_of_the_readme_are_on_the_linked_pages() -> None:
    bullets = README.read_text().split("## Why this one")[1].split("```")[0].split("\n- ")[1:]
    for bullet in bullets:
        pages = "".join((REPOSITORY / page).read_text() for page in re.findall(r"\]\(([^)#]+)", bullet))
        figures = re.findall(r"(?<![\w.-])\d[\d,.]*(?<=\d)(?![\w-])", re.sub(r"\]\([^)]*\)", "]", bullet))
        assert figures or "computed" in bullet
        for figure in figures:
            assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?!\d|[.,]\d)", pages), f"{figure}: {bullet}"


def test_the_settings_reference_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "out of date: make settings"


def test_paths_of_the_layout_tree_exist() -> None:
    assert not [path for path in tree() if not (REPOSITORY / path).exists() or path.endswith("/") != (REPOSITORY / path).is_dir()]


def test_the_layout_tree_has_every_package_and_script() -> None:
    packages = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    scripts = [
        str(path.relative_to(REPOSITORY))
        for package in ("training", "stage1_vqvae", "stage2_prior", "pipelines", "benchmarks")
        for path in (REPOSITORY / package).glob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    ]
    assert not {package.replace(".", "/") + "/" for package in packages} - set(tree())
    assert not set(scripts) - set(tree())
