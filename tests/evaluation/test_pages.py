"""Pages stand alone and anyone can read them: right nesting, named tables and pictures, nothing fetched, numbers in due
figures.
"""

import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.text import Text

import flowbp
from flowbp.config import load
from flowbp.evaluation import figures
from flowbp.evaluation.models import run_evaluation
from flowbp.evaluation.pages import as_png, images_a_step, render
from flowbp.evaluation.runs import compare_runs
from flowbp.evaluation.templates import between, direction, duration, number, scale_of, scale_of_change
from flowbp.methods import DRaFTLV, FlowBPSparse, ReFL

VOID = {"meta", "img", "br", "link"}


class Outline(HTMLParser):
    """Fails on a tag that closes another; keeps what tables, pictures and links say."""

    def __init__(self, page):
        super().__init__()
        self.open, self.images, self.links, self.headers, self.tables, self.captions = [], [], [], [], 0, 0
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(found)
        if tag == "th":
            self.headers.append(found.get("scope"))
        self.links += [found[key] for key in ("src", "href") if key in found]
        self.tables += tag == "table"
        self.captions += tag == "caption"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def pages(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    config = load(run / "config.yaml")
    run_evaluation(config, {"base": None, "tuned": run}, folder / "eval")
    shutil.copytree(run, folder / "again")
    compare_runs([run, folder / "again"], folder / "comparison")
    files = {
        "run": run / "report.html",
        "evaluation": folder / "eval/report.html",
        "comparison": folder / "comparison/comparison.html",
    }
    return {name: file.read_text() for name, file in files.items()}


@pytest.mark.parametrize("name", ["run", "evaluation", "comparison"])
def test_a_page_is_nested_right_names_its_tables_and_pictures_and_fetches_nothing(pages, name):
    page = pages[name]
    outline = Outline(page)
    assert outline.tables == outline.captions > 0 and set(outline.headers) <= {"col", "row", "rowgroup"}
    assert outline.images and all(len(image["alt"]) > 10 for image in outline.images)
    assert all(link.startswith("data:") for link in outline.links) and "http" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize("name", ["run", "evaluation", "comparison"])
def test_a_page_says_first_what_was_made_how_and_with_which_version(pages, name):
    page, levels = pages[name], "noise levels of the pipeline" if name == "evaluation" else "published noise levels"
    for text in (f"4 steps on the {levels}, 32 x 32 pixels, guidance 1", f"flowbp {flowbp.__version__}", "torch "):
        assert text in page
    assert (">2026<" if name == "evaluation" else ">42<") in page, "the seed"


def test_a_report_goes_from_the_changes_over_samples_and_curves_to_all_metrics(pages):
    parts = ["Before and after training", "<h2>Samples", "<h2>Training", "<h2>All metrics", "<summary>By category"]
    places = [pages["run"].index(part) for part in parts]
    assert places == sorted(places)
    images = [image["alt"].partition(":")[0] for image in Outline(pages["run"]).images]
    assert images[:4] == ["before", "after"] * 2, "prompt by prompt"


def test_runs_of_equal_methods_are_not_called_a_comparison_of_methods(run, pages):
    assert "The methods are the same" in pages["comparison"]


@pytest.mark.parametrize(
    ("value", "scale", "text"),
    [
        (0.51234, 0.5, "0.512"),
        (-0.0001, 0.5, "0.000"),
        (0.000123, 0.0004, "0.00012"),
        (123.456, 123.4, "123"),
        (12345.6, 12345.6, "12346"),
        (1.5, 0.0, "1.500"),
    ],
)
def test_numbers_have_three_decimals_or_enough_figures_of_their_scale(value, scale, text):
    assert number(value, scale) == text


def test_a_change_far_smaller_than_its_means_is_not_shown_as_zero():
    row = {"before": 0.087, "after": 0.0873, "change": 0.00032, "low": -0.00033, "high": 0.0025}
    scale = scale_of_change(row)
    assert (
        number(row["change"], scale, "+") == "+0.0003"
        and between((row["low"], row["high"]), scale) == "[-0.0003, 0.0025]"
    )
    assert scale_of(row) == 0.0873 and scale_of_change(row | {"low": None, "high": None}) == 0.00032


def test_what_is_no_number_is_a_dash():
    assert number(None) == number(float("nan")) == between((None, None)) == "–"
    assert number(0.1, sign="+") == "+0.100" and between((-1, 250), 250) == "[-1, 250]"
    assert (duration(45), duration(600), duration(36000)) == ("45 s", "10.0 min", "10.0 h")


def test_a_change_has_a_direction_where_its_interval_excludes_zero_and_p_is_below_5_percent():
    rise, fall = {"low": 0.1, "high": 0.2}, {"low": -0.2, "high": -0.1}
    assert [direction(row | {"p_value": 0.049}) for row in (rise, fall)] == [1, -1]
    assert [direction(row | {"p_value": 0.05}) for row in (rise, fall)] == [0, 0]
    assert direction({"low": -0.1, "high": 0.2, "p_value": 0.01}) == direction({"low": None, "p_value": 0.01}) == 0


def test_images_a_step_are_those_that_were_recorded():
    config = load("demo")
    assert images_a_step(config, [{"images": 64}, {"images": 64}]) == 64
    assert images_a_step(config, [{}]) == 32, "an older run, of one process as far as is known"


def test_a_running_mean_leaves_out_what_is_not_finite():
    np.testing.assert_allclose(figures.running_mean(np.array([1.0, np.nan, 3.0, np.inf, np.nan]), 2), [1, 3, 3, np.nan])


def test_each_run_has_a_line_of_its_own():
    lines = figures.styles([f"run {i}" for i in range(15)])
    assert len({tuple(style.values()) for style in lines.values()}) == 15


SIGMAS = np.linspace(1, 0, 9)
MATHEMATICS = "a bag marked $$ {x} \\\\frac & 5 % of $x_ \x1b[2J \0 \udc80"


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(
    "draw",
    [
        lambda text: figures.sample_grid(np.zeros((2, 8, 8, 3)), [text, text], [True, None]),
        lambda text: figures.curves({text: [{"step": 1, text: 0.5}]}, text, text, text),
        lambda text: figures.draw_plan(ReFL(last_n=2).plan(SIGMAS, np.random.default_rng(0)), SIGMAS, text),
    ],
    ids=["sample_grid", "curves", "draw_plan"],
)
def test_prompts_and_names_are_text_in_every_picture(draw):
    with rc_context({"text.usetex": True}):  # a user's own settings of matplotlib
        figure = draw(MATHEMATICS)
        assert as_png(figure)
    drawn = " ".join(text.get_text() for text in figure.findobj(Text))
    assert "$$" in drawn and "\x1b" not in drawn


@pytest.mark.parametrize(
    ("method", "cached", "copies"),
    [(FlowBPSparse(num_active=3), 5, 0), (FlowBPSparse(num_active=8), 0, 0), (DRaFTLV(num_renoised=2), 0, 2)],
    ids=["some steps", "all steps", "copies"],
)
def test_a_plan_shows_what_it_reads_from_the_cache_and_its_copies(method, cached, copies):
    figure = figures.draw_plan(method.plan(SIGMAS, np.random.default_rng(0)), SIGMAS)
    dots = {drawn.get_label(): len(drawn.get_offsets()) for drawn in figure.axes[0].collections}
    assert dots.get("from the cache: in the value, without gradient", 0) == cached
    assert dots.get(f"replayed too: {copies} re-noised copies", 0) == copies


def test_a_page_shows_names_as_they_were_typed_and_can_be_written():
    facts = {"prompts": "<b>$$</b> \x1b[2J \udc80"}
    results = {"models": [], "changes": []}
    parts = {"results": results, "overall": {}, "strengths": {}, "pairs": [], "config": load("demo"), "settings": ""}
    page = render("evaluation.html", name="[/b]", facts_of_evaluation=facts, **parts)
    assert "[/b]" in page and r"&lt;b&gt;$$&lt;/b&gt; \x1b[2J \udc80" in page and page.encode()
