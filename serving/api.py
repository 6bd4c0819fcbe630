"""The price service: one page, an API under /v1, and jobs for whole catalogues.

    python -m serving.api --model OUT --port 8000
    curl -s localhost:8000/v1/price -F title="Organic green tea, 20 bags" -F picture=@tea.jpg

The README of this folder lists the endpoints. Every error is {"detail": "<one sentence>"}.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.errors import run_entry_point
from serving.config import PriceServiceSettings
from training.settings import parse_settings

if TYPE_CHECKING:
    from pricing.model import PriceModel
    from serving.app import Service

PAGE = Path(__file__).with_name("page.html")


def create_service(settings: PriceServiceSettings) -> Service:
    """Load the models and put the service together.

    Raises:
        InputError: whatever is wrong with the saved system or the index.
    """
    from data.public_addresses import PublicOpener
    from pricing.model import PriceModel
    from serving.app import Service
    from serving.pictures import PictureDesk, fetch_with, picture_router
    from serving.prices import PriceDesk, price_router

    model = PriceModel.load(settings.model, device=settings.device)
    service = Service(
        "Price service",
        "Prices products by their text, facts and pictures",
        settings,
        largest_bodies={("POST", "/v1/jobs"): settings.max_job_bytes},
    )
    fetch = fetch_with(PublicOpener(), settings.max_body_bytes) if settings.picture_urls else None
    pictures = PictureDesk(model, fetch=fetch, secret=service.token)
    service.on_stop.append(pictures.close)
    desk = PriceDesk(model, settings, pictures)
    desk.warm_up()
    service.app.state.desk = desk
    service.app.include_router(price_router(service, desk, settings))
    service.app.include_router(picture_router(pictures))
    _add_jobs(service, settings, model)
    if settings.index is not None:
        _add_matching(service, settings, settings.index)
    _add_page(service)
    return service


def _add_jobs(service: Service, settings: PriceServiceSettings, model: PriceModel) -> None:
    from serving.jobs import JobStore, job_router
    from serving.worker import Supervisor, fingerprint_of

    store = JobStore(settings.jobs or model.root / "jobs")
    supervisor = Supervisor(store, settings)
    service.on_start.append(supervisor.start)
    service.on_stop.append(supervisor.stop)
    service.app.include_router(job_router(service, store, settings, model.mapping, fingerprint_of(model)))


def _add_matching(service: Service, settings: PriceServiceSettings, index: Path) -> None:
    from product_matching.search import Matcher
    from serving.matches import MatchDesk, match_router

    matcher = Matcher.load(index, settings.index_model, settings.device)
    matcher.match(["warm up"], 1)
    desk = MatchDesk(
        service,
        matcher,
        max_titles=settings.max_titles,
        max_k=settings.max_k,
        max_title_characters=settings.max_text_characters,
    )
    service.app.include_router(match_router(desk))


def _add_page(service: Service) -> None:
    """The page at /. Its content security policy admits its own scripts and styles by their hashes."""
    from starlette.responses import HTMLResponse

    from serving.headers import page_policy

    html = PAGE.read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": page_policy(html)}

    @service.app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(PriceServiceSettings, argv, description=__doc__.split("\n")[0])
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bar per request
    import torch

    if settings.threads:
        torch.set_num_threads(settings.threads)
    service = create_service(settings)
    print(f"http://{settings.host}:{settings.port} prices with {settings.model}", flush=True)
    service.run()


if __name__ == "__main__":
    run_entry_point(main)
