"""Pictures that come in, checked before a model sees them, and pictures of known products that go out.

Both ways lead through the one safe reader of the project. What goes out is a small JPEG that was made from the decoded
pixels, so that nothing else in a file can reach a browser.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import io
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.security import HTTPAuthorizationCredentials
from starlette.datastructures import UploadFile
from starlette.responses import Response

from contracts.catalog import read_table
from data.download_images import Downloader, DownloadSettings
from data.public_addresses import PublicOpener
from pricing.model import PriceModel
from serving.app import bearer, problems, require_token
from serving.batching import Busy
from serving.form import PICTURE, PICTURE_URL
from serving.limits import QUOTED
from training.pictures import UnreadablePicture, open_picture

DECODED_SIDE = 64
"""Pixels of the shorter side at which a JPEG is checked: a small scale is faster and still reads every byte."""
THUMBNAIL_SIDE = 320
"""Pixels of the longer side of a picture that goes out."""
AT_ONCE = 2
"""Pictures that are decoded at once. Each may take 120 MB for a moment."""
FETCHED_AT_ONCE = 4
MOST_FETCHES = 16
"""Pictures that are fetched or wait for it; a further one is answered 503."""
SILENT_SECONDS, FETCH_SECONDS = 5.0, 15.0
"""How long the server of a picture may stay silent, and take in all."""


Fetch = Callable[[str, Path], None]
"""Downloads a picture from an address to a path, or raises HTTPException 422."""


class PictureDesk:
    """Pictures of one model, in and out.

    Args:
        fetch: None where addresses of pictures are not accepted.
        secret: with one, paths of pictures carry a key that is derived from it, since `<img>` can send no token.
    """

    def __init__(self, model: PriceModel, *, fetch: Fetch | None = None, secret: str = ""):
        self.folder = model.images
        self.fetch = fetch
        self.secret = secret
        self.files = _picture_files(model)
        self.threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="picture")
        # servers may be slow, and pictures that are already here do not wait for them
        self.fetching = ThreadPoolExecutor(FETCHED_AT_ONCE, thread_name_prefix="fetch")
        self.waiting = 0
        self.scratch = tempfile.TemporaryDirectory(prefix="serving-pictures-")

    async def close(self) -> None:
        await asyncio.to_thread(self.threads.shutdown)
        await asyncio.to_thread(self.fetching.shutdown, cancel_futures=True)
        self.scratch.cleanup()

    @asynccontextmanager
    async def received(self, upload: UploadFile | None, address: str) -> AsyncIterator[Path | None]:
        """The picture of a request as a file, which is gone when the block ends.

        Raises HTTPException 422 for one that cannot be used.
        """
        if upload is None and not address:
            yield None
            return
        if upload is not None and address:
            raise HTTPException(422, f"{PICTURE_URL}: there is a picture already; leave one of them out")
        with tempfile.TemporaryDirectory(dir=self.scratch.name) as folder:
            path = Path(folder) / PICTURE
            if upload is not None:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self.threads, _save_checked, upload, path)
            else:
                await self._fetched(address, path)
            yield path

    async def _fetched(self, address: str, path: Path) -> None:
        if self.fetch is None:
            raise HTTPException(
                422, f"{PICTURE_URL}: this service fetches no pictures; send the file as {PICTURE}"
            )
        if self.waiting >= MOST_FETCHES:
            raise Busy
        self.waiting += 1
        try:
            await asyncio.get_running_loop().run_in_executor(self.fetching, self.fetch, address, path)
        finally:
            self.waiting -= 1

    def path_of(self, sample_id: str) -> str | None:
        """Where the service has the picture of a known product, if it has one."""
        file = self.files.get(sample_id)
        if not file or not (self.folder / file).is_file():
            return None
        path = f"/v1/pictures/{quote(sample_id, safe='')}"
        return f"{path}?key={self.key_of(sample_id)}" if self.secret else path

    def key_of(self, sample_id: str) -> str:
        return hmac.new(self.secret.encode(), sample_id.encode(), hashlib.sha256).hexdigest()[:32]

    def thumbnail(self, sample_id: str) -> bytes:
        """A small JPEG. Raises UnreadablePicture."""
        picture = open_picture(self.folder / self.files[sample_id], min_side=THUMBNAIL_SIDE)
        picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=85)
        return content.getvalue()


def picture_router(desk: PictureDesk) -> APIRouter:
    router = APIRouter(tags=["prices"])
    content = {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}
    answers: dict[int | str, Any] = {200: {"content": content}}

    @router.get(
        "/v1/pictures/{sample_id:path}", response_class=Response, responses=answers | problems(401, 404, 422)
    )
    async def picture(
        request: Request,
        sample_id: str,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
        key: Annotated[str, Query(description="as it stands in the answer that named this picture")] = "",
    ) -> Response:
        """The picture of a known product, at most 320 pixels wide and high."""
        if not (desk.secret and hmac.compare_digest(key.encode(), desk.key_of(sample_id).encode())):
            await require_token(request, credentials)
        if desk.path_of(sample_id) is None:
            raise HTTPException(404, "there is no picture of this product")
        loop = asyncio.get_running_loop()
        try:
            content = await loop.run_in_executor(desk.threads, desk.thumbnail, sample_id)
        except UnreadablePicture:
            raise HTTPException(404, "the picture of this product cannot be read") from None
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    return router


def _save_checked(upload: UploadFile, path: Path) -> None:
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file)
    require_picture(path)


def require_picture(path: Path, field: str = PICTURE) -> None:
    """Raises HTTPException 422 naming the reason where this is no whole picture."""
    try:
        open_picture(path, min_side=DECODED_SIDE)
    except UnreadablePicture as error:
        raise HTTPException(422, f"{field}: {error}; send a whole JPEG, PNG, WebP, GIF or BMP") from None


def fetch_with(opener: PublicOpener, max_bytes: int) -> Fetch:
    """By the rules of `data.download_images`, from public addresses only."""

    def fetch(address: str, path: Path) -> None:
        once = DownloadSettings(
            retries=0, timeout=SILENT_SECONDS, deadline=FETCH_SECONDS, max_bytes=max_bytes
        )
        download = Downloader(path.parent, once)
        download.opener = opener
        outcome = download(path.name, address)
        if outcome.status != "ok":
            raise HTTPException(
                422, f"{PICTURE_URL}: {outcome.status} ({outcome.detail[:QUOTED]}); send the file"
            )

    return fetch


def _picture_files(model: PriceModel) -> dict[str, str]:
    """The file name of each known product's picture, by its id."""
    table = model.workspace.path("prepared", split="train")
    if not table.is_file():
        return {}
    columns = read_table(table)
    if "image" not in columns:
        return {}  # an exported system keeps names and prices only
    has_picture = columns["image"] != ""
    return dict(zip(columns.loc[has_picture, "sample_id"], columns.loc[has_picture, "image"], strict=True))
