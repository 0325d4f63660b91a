"""The pages at `/`: the runs, and one run with its curves and experts. The report's charts, while the run goes on."""

from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, HTMLResponse

from logitlake_shared.web.app import service_of
from logitlake_shared.web.doors import Asking
from logitlake_shared.web.html import render
from logitlake_student.api.runs import RunOf, listed_run, run_document, runs_of
from logitlake_student.report_training import StageCurves, expert_charts, training_charts
from logitlake_student.run_files import find_runs, read_stages, thinned

__all__ = ["page_routes"]

_PACKAGE = "logitlake_student.api"
# Points of a curve; a chart is some hundred pixels wide.
_POINTS = 300


def page_routes() -> APIRouter:
    """`/`, `/runs/…`."""
    router = APIRouter(include_in_schema=False)
    router.add_api_route("/", _overview, response_class=HTMLResponse)
    router.add_api_route("/runs/{run}", _one_run, response_class=HTMLResponse)
    router.add_api_route("/static/charts.css", _looks, response_class=FileResponse)
    return router


def _page(request: Request, template: str, **values: Any) -> HTMLResponse:
    return render(request, template, package=_PACKAGE, **values)


def _overview(request: Request, asking: Asking) -> HTMLResponse:
    asking.require("read")
    folder = runs_of(request)
    runs = [listed_run(request, asking, folder / name) for name in find_runs(folder) if asking.sees(name)]
    return _page(request, "runs", runs=runs, problems=service_of(request).problems())


def _one_run(request: Request, asking: Asking, run: RunOf, live: bool = False) -> HTMLResponse:
    stages = read_stages(run)
    curves = [_thinned(stage.curves()) for stage in stages]
    return _page(
        request,
        "run_live" if live else "run",
        run=run_document(request, asking, run, stages),
        saved=[saved for stage in stages for saved in stage.saved()],
        training=list(training_charts(curves)),
        experts=expert_charts(curves),
        is_live=any(stage.figures is None for stage in stages),
    )


def _thinned(curves: StageCurves) -> StageCurves:
    return StageCurves(curves.name, curves.steps, thinned(curves.metrics, _POINTS), curves.samples_by_mass)


def _looks() -> FileResponse:
    path = files("logitlake_student") / "charts.css"
    return FileResponse(str(path), media_type="text/css", headers={"Cache-Control": "max-age=300"})
