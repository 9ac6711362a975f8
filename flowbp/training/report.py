"""The report of a run: tables, curves and pictures in the run's folder."""

from collections.abc import Mapping

import numpy as np

from flowbp.config import dump
from flowbp.evaluation import figures
from flowbp.evaluation.pages import as_data_uri, as_png, draw_samples, render
from flowbp.evaluation.scores import Scores, compare
from flowbp.methods import draw_plan
from flowbp.runtime.environment import environment
from flowbp.runtime.files import as_json
from flowbp.runtime.run_folder import RunFolder
from flowbp.training.trainer import Trainer


def write_report(trainer: Trainer, folder: RunFolder, scores: Mapping[str, Scores], validation: dict | None) -> None:
    """Write all that a run has to show into its folder. The main process writes.

    scores: of the weights "before" and "after" training, or none. validation: the sentinel's summary, if there is one.

    plan.png          an example of a plan
    scores_NAME.csv   scores, and samples_NAME.png the images that they kept
    evaluation.json   the paired changes between both scores
    validation.json   the sentinel's summary
    report.html       all of it on one page, with the curves of training
    """
    if not folder.writes:
        return
    config, sigmas = trainer.config, trainer.model.sigmas.double().numpy()
    plan = draw_plan(config.method, sigmas, np.random.default_rng(config.seed), config.rollout.solver)
    drawn = figures.draw_plan(plan, sigmas.tolist(), f"{config.method_name}: one plan of {len(sigmas) - 1} steps")
    plan_png = as_png(drawn)
    folder.write("plan.png", plan_png)
    for name, each in scores.items():
        folder.write(f"samples_{name}.png", as_png(draw_samples(each)))
        folder.write(f"scores_{name}.csv", each.as_csv())
    differences = compare(*scores.values()) if scores else []
    if scores:
        folder.write("evaluation.json", as_json(differences))
    if validation is not None:
        folder.write("validation.json", as_json(validation))
    page = render(
        "report.html",
        name=folder.path.name,
        config=config,
        scorers=[*config.reward, *(config.evaluation.monitors if config.evaluation else ())],
        rows=folder.metrics(),
        scores=scores,
        differences=differences,
        validation=validation,
        plan=as_data_uri(plan_png),
        environment=environment(),
        settings=dump(config),
    )
    folder.write("report.html", page)
