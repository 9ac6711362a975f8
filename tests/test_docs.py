"""The pages are true: their commands run, or at least parse; their config keys, files, names and links exist.

A ```bash block is run command by command, all blocks of a page in one empty folder. One that a test cannot run says why
behind the word bash, and its commands are then checked alone: programs, options, configs, files.

    needs=gpu         needs=download         takes=long
"""

import ast
import importlib
import os
import re
import runpy
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from commands import ROOT, Wrong, calls, check, example, is_command, is_name, run
from pydantic import BaseModel

from flowbp.config import RunConfig
from flowbp.config.loading import merge, read
from flowbp.methods import METHODS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {"needs=gpu", "needs=download", "takes=long"}
FENCE = re.compile(r"^```(\w*) *([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SCRIPTS = sorted(path for folder in ("benchmarks", "examples") for path in (ROOT / folder).glob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
every_text = pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(what stands behind the language, text) of the page's blocks of this language."""
    return [(mark, body) for name, mark, body in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def prose(page: Path) -> str:
    """The page without its blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """What stands between backticks in the prose; a line end within them is a blank."""
    return [" ".join(said.split()) for said in re.findall(r"`([^`]+)`", prose(page))]


# -- commands ------------------------------------------------------------------------------------------------------


@every_page
def test_every_command_of_a_block_runs_or_says_why_not(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for mark, body in blocks(page, "bash"):
        assert mark in {"", *NOT_RUN}, f"{page.name}: ```bash {mark} is none of {NOT_RUN}"
        for command in calls(body, tmp_path / "shell"):
            check(command)
            if not mark:
                run(command)


@every_page
def test_every_command_within_a_line_parses(page, tmp_path):
    for said in spans(page):
        said = re.sub(r"^(?:\w+=\S* )+", "", said)  # variables before the command
        if is_command(said) and not is_name(said):
            for command in calls(example(said), tmp_path):
                check(command)


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_every_command_of_a_docstring_parses(script, tmp_path):
    """Those that stand on lines of their own, as the scripts say how they are called."""
    about = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    for paragraph in re.findall(r"(?:^    .*\n?)+", about, re.MULTILINE):
        if any(is_command(line.strip()) for line in paragraph.splitlines()):
            for command in calls(example(paragraph), tmp_path):
                check(command)


@every_page
def test_no_command_hides_in_an_unmarked_block(page):
    for _, body in blocks(page, ""):
        assert not any(is_command(line.strip("$ ")) for line in body.splitlines()), body


@pytest.mark.parametrize(
    ("command", "because"),
    [
        ("flowbp tran demo", "no command 'tran'"),
        ("flowbp train demo --resum", "No such option"),
        ("flowbp train demo memory.recomptue=auto", "did you mean 'recompute'"),
        ("flowbp train demo memory.recompute=sometimes", "'always', 'never' or 'auto'"),
        ("flowbp train sd3.5-medium/flowbp-lagrage", "unknown preset"),
        ("flowbp plan flowbp-lagrange alhpa=0.3", "did you mean 'alpha'"),
        ("flowbp rewards pickscor", "did you mean 'pickscore'"),
        ("flowbp bench --operation quadrature_update", "unrecognized arguments"),
        ("python benchmarks/seed.py runs/a", "there is no"),
        ("python benchmarks/train_step.py --backbones flux.1-dev", "unrecognized arguments"),
        ("python benchmarks/estimates.py --json a", "takes no arguments"),
        ("python -m flowbp.shapes.recipe all --output a", "--output"),
        ("torchrun --nproc-per-node 8 -m flowbp train demo data.batch=2", "unknown key 'batch'"),
        ("accelerate launch --config_file configs/accelerate/9-gpus.yaml -m flowbp train demo", "9-gpus.yaml"),
        ("pytest tests/test_goldn.py", "there is no"),
        ("pytest tests/test_estimate.py -k prat", "no test has 'prat'"),
        ("make demos", "no demos"),
        ("make builds TROCH=a", "no TROCH"),
        ("pip install '.[trian]'", "no extra"),
        ("hf donwload a/b", "No such command 'donwload'"),
        ("hf download a/b --localdir c", "No such option"),
        ("flwbp train demo", "command not found"),
        ("flowbp train 'demo", "unexpected EOF"),
    ],
)
def test_what_is_misspelt_is_found(command, because, tmp_path):
    with pytest.raises(Wrong, match=re.escape(because)):
        for arguments in calls(command, tmp_path):
            check(arguments)


# -- config --------------------------------------------------------------------------------------------------------


@every_page
def test_every_yaml_block_is_part_of_a_config(page):
    for _, body in blocks(page, "yaml"):
        values: dict[str, Any] = {}
        for layer in (*read("demo"), yaml.safe_load(body)):
            merge(values, layer)
        RunConfig.model_validate(values)


@every_page
def test_every_key_of_the_prose_is_one_that_a_config_has(page):
    for said in spans(page):
        key, equals, _ = said.partition("=")
        if said in NOT_RUN or not re.fullmatch(r"[a-z_]+(\.[\w-]+)*", key) or Path(key).suffix in SUFFIXES:
            continue
        if equals and " " not in said and key not in NOT_KEYS or key.partition(".")[0] in SECTIONS and "." in key:
            assert known_key(key), f"{page.name}: a config has no {key}"


SECTIONS = {name for name, field in RunConfig.model_fields.items() if "." not in name} - {"output", "seed", "steps"}
SUFFIXES = {".json", ".jsonl", ".yaml", ".md", ".py", ".png", ".html", ".csv", ".safetensors", ".txt"}
NOT_KEYS = {"guidance_scale"}  # of diffusers' pipelines


def known_key(key: str) -> bool:
    """Whether `a.b.c` is a path through the config's fields."""
    kinds: set[Any] = {RunConfig}
    for part in key.split("."):
        kinds = {inner for kind in kinds for inner in below(kind, part)}
    return bool(kinds)


def below(kind: Any, part: str) -> set[Any]:
    """The types that `part` of a `kind` may have; none where it has no such part.

    Several rewards or monitors have names of one's own: there any word is a part.
    """
    if get_origin(kind) is dict:
        (spec,) = (inner for inner in get_args(kind) if isinstance(inner, type) and issubclass(inner, BaseModel))
        return below(spec, part) or {spec}
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if part not in kind.model_fields:
            return set()
        return set(METHODS.values()) if part == "method" else members(kind.model_fields[part].annotation)
    if kind in METHODS.values() and part == "name":
        return {str}
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return {inner for field in fields(kind) if field.name == part for inner in members(hints[part])}
    return set()


def members(annotation: Any) -> set[Any]:
    """The types of a union, without what annotates them; a dict stands for itself."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return {kind for inner in get_args(annotation) for kind in members(inner)}
    return {annotation} if get_origin(annotation) is dict or isinstance(annotation, type) else {object}


# -- names, files, links -------------------------------------------------------------------------------------------


@every_text
def test_every_file_that_is_named_exists(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(
        r"(?<![\w./-])(?:flowbp|flowbp_kernels|csrc|tests|benchmarks|examples|configs)/[\w./-]*\w", text
    ):
        assert (ROOT / name).exists(), f"{page.name}: there is no {name}"


@every_text
def test_every_name_of_the_packages_exists(page):
    for name in re.findall(r"(?<![\w./-])flowbp(?:_kernels)?(?:\.[A-Za-z_]\w*)+", " ".join(spans(page))):
        module, found = name, None
        while found is None:
            try:
                found = importlib.import_module(module)
            except ModuleNotFoundError:
                module = module.rpartition(".")[0]
        for attribute in name.removeprefix(module).split(".")[1:]:
            found = getattr(found, attribute)


@every_text
def test_every_variable_of_the_environment_is_read_somewhere(page):
    for name in set(re.findall(r"\bFLOWBP_[A-Z_]+\b", page.read_text(encoding="utf-8"))):
        assert name in sources(), f"{page.name}: nothing reads {name}"


@cache
def sources() -> str:
    files = [ROOT / "Makefile", ROOT / "setup.py", *(ROOT / "benchmarks").iterdir()]
    files += [
        path for folder in ("flowbp", "flowbp_kernels", "csrc", "tests") for path in (ROOT / folder).rglob("*.[pch]*")
    ]
    return "\n".join(
        path.read_text(errors="ignore") for path in files if path.is_file() and path.name != "test_docs.py"
    )


@every_text
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", prose(page)):
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), f"{page.name} -> {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(other), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], target


def test_the_index_lists_every_page():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert {page.name for page in PAGES[1:]} - {"README.md"} == set(re.findall(r"\]\((\w+\.md)\)", index))


def test_the_readme_says_what_every_folder_is_for():
    (tree,) = [body for _, body in blocks(ROOT / "README.md", "") if "flowbp/plan.py" in body]
    engine = {path.name for path in (ROOT / "flowbp").glob("[a-z]*.py")}
    folders = {path.parent.name for path in (ROOT / "flowbp").glob("*/__init__.py")}
    assert engine | {f"{folder}/" for folder in folders} <= set(re.findall(r"flowbp/(\w+(?:\.py|/))", tree))


@every_text
def test_lines_are_at_most_120_wide(page):
    # Not Python, whose width ruff checks where it lies, and not the tables that benchmarks/tables.py writes.
    others = r"```python\n.*?```|<!-- table [\w-]+ -->.*?<!-- end of table -->"
    text = re.sub(others, "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    long = [
        line for line in text.splitlines() if len(line) > 120 and not line.startswith("|") and "](" not in line[110:]
    ]
    assert not long, f"{page.name}: {long}"


# -- Python and pictures -------------------------------------------------------------------------------------------


@every_page
def test_every_python_block_parses(page):
    for _, body in blocks(page, "python"):
        ast.parse(body)


def test_the_picture_of_a_step_is_the_one_that_its_script_draws():
    drawn = runpy.run_path(str(ROOT / "docs/pictures.py"))["step_picture"]()
    assert (ROOT / "docs/step.svg").read_text(encoding="utf-8") == drawn


def test_a_page_for_pictures_stays_small():
    assert os.path.getsize(ROOT / "docs/demo/before_after.png") < 300_000
