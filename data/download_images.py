"""Download the pictures of the prepared tables; run it again to continue.

    python -m data.download_images --workspace OUT --workers 16 --deadline 3600

Missing pictures are normal: every row gets a line in data/image_status.csv and the command succeeds.
Status: ok, present (was there and is whole), no_link, bad_link, http_404 (or another code), timeout,
unreachable, truncated, too_large, not_an_image, deadline (no time was left), interrupted (Ctrl-C).
"""

from __future__ import annotations

import http.client
import os
import random
import ssl
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import pandas as pd
from tqdm import tqdm

from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write
from contracts.workspace import REPOSITORY, SPLITS, Workspace
from training.pictures import UnreadablePicture, open_picture
from training.settings import parse_settings

FIRST_BACKOFF = 1.0  # seconds before the first retry; doubles each time
# no bare OSError: a full disk must end the run, not become a missing picture
NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    TimeoutError,
    ConnectionError,
    ssl.SSLError,
)
HEADERS = {"User-Agent": "product-price-images/1.0", "Accept": "image/*"}


@dataclass
class DownloadSettings:
    workspace: str = str(REPOSITORY)
    """Folder with data/prepared_train.csv and data/prepared_test.csv."""
    images: str | None = None
    """Folder that receives the pictures; default the images folder named in data/catalog.json."""
    workers: int = 16
    """Downloads at the same time."""
    retries: int = 3
    """Further attempts after 429, 5xx, a timeout or a broken connection."""
    timeout: float = 10.0
    """Seconds a server may stay silent; a whole picture may take six times that."""
    deadline: float = 3600.0
    """Seconds for everything; what is left then is for the next run."""
    max_bytes: int = 20_000_000
    """Larger pictures are refused."""

    def __post_init__(self):
        minimum = {"workers": 1, "retries": 0, "timeout": 0.001, "deadline": 0, "max_bytes": 1}
        for name, least in minimum.items():
            if not getattr(self, name) >= least:
                raise InputError(f"{name} is {getattr(self, name)}, must be {least} or more")


class Outcome(NamedTuple):
    status: str
    detail: str = ""


class DownloadError(Exception):
    """One attempt failed; `retry` says whether another one may help, not before `wait` seconds."""

    def __init__(self, status: str, detail: str = "", *, retry: bool = False, wait: float = 0.0):
        super().__init__(status, detail)
        self.outcome, self.retry, self.wait = Outcome(status, detail), retry, wait


class _NoFTP(urllib.request.FTPHandler):
    """urllib would follow a redirect to ftp:; it refuses file: and the rest by itself."""

    def ftp_open(self, request):
        raise urllib.error.URLError("redirected to ftp")


class Downloader:
    """Fetches pictures into `folder` until `deadline` seconds from now, or until `stop` is set."""

    def __init__(self, folder: Path, settings: DownloadSettings):
        self.folder, self.settings = folder, settings
        self.opener = urllib.request.build_opener(_NoFTP)
        self.stop = threading.Event()
        self.ends = time.monotonic() + settings.deadline

    def __call__(self, image: str, link: str) -> Outcome:
        """Make `folder/image` a whole picture, or say why not. A damaged file from elsewhere is replaced."""
        path = self.folder / image
        if self._out_of_time() is None and path.is_file() and _damage(path) is None:
            return Outcome("present")
        attempt = 0
        while not (late := self._out_of_time()):
            attempt += 1
            try:
                size = self._fetch(link, path)
                return Outcome("ok", f"{size} bytes, {attempt} attempt{'s' * (attempt > 1)}")
            except DownloadError as error:
                # jitter, so that refused workers do not all come back at once
                wait = max(FIRST_BACKOFF * 2 ** (attempt - 1) * random.uniform(0.5, 1.0), error.wait)
                last = attempt > self.settings.retries or time.monotonic() + wait > self.ends
                if last or not error.retry:
                    return error.outcome
            self.stop.wait(wait)
        return late

    def _out_of_time(self) -> Outcome | None:
        if self.stop.is_set():
            return Outcome("interrupted")
        return Outcome("deadline") if time.monotonic() >= self.ends else None

    def _fetch(self, link: str, path: Path) -> int:
        """One attempt: stream to a temporary name, check that it is a picture, rename. Returns its bytes."""
        part = path.with_name(f".{path.name}.part")
        silence = max(0.001, min(self.settings.timeout, self.ends - time.monotonic()))
        try:
            if urlsplit(link).scheme not in ("http", "https"):
                raise DownloadError("bad_link", "not http or https")
            # quote() leaves an already quoted link as it is
            request = urllib.request.Request(quote(link, safe="%/:=&?~#+!$,;'@()*[]"), headers=HEADERS)
            with self.opener.open(request, timeout=silence) as response, part.open("wb") as file:
                size = self._stream(response, file)
            if damage := _damage(part):
                raise DownloadError("not_an_image", damage)
            os.replace(part, path)
            return size
        except urllib.error.HTTPError as error:
            error.close()
            wait = _retry_after(error.headers.get("Retry-After"))
            retry = error.code == 429 or error.code >= 500
            raise DownloadError(f"http_{error.code}", str(error.reason), retry=retry, wait=wait) from None
        except (http.client.InvalidURL, ValueError) as error:
            raise DownloadError("bad_link", str(error)) from None
        except NETWORK_ERRORS as error:
            reason = getattr(error, "reason", error)  # URLError wraps the real one
            if late := self._out_of_time():
                raise DownloadError(*late) from None
            if isinstance(reason, TimeoutError):
                raise DownloadError("timeout", f"silent for {silence:g} s", retry=True) from None
            raise DownloadError("unreachable", f"{type(reason).__name__}: {reason}", retry=True) from None
        finally:
            part.unlink(missing_ok=True)

    def _stream(self, response: http.client.HTTPResponse, file) -> int:
        limit, size, ends = self.settings.max_bytes, 0, time.monotonic() + 6 * self.settings.timeout
        announced = response.headers.get("Content-Length", "")
        expected = int(announced) if announced.isdecimal() else 0
        if expected > limit:
            raise DownloadError("too_large", f"{expected} bytes announced, --max-bytes is {limit}")
        # read1 returns what has arrived: read would wait for a full block, whatever the clock says
        while block := response.read1(65536):
            size += len(block)
            if size > limit:
                raise DownloadError("too_large", f"more than --max-bytes {limit}")
            if late := self._out_of_time():
                raise DownloadError(*late)
            if time.monotonic() > ends:
                raise DownloadError(
                    "timeout", f"not complete after {6 * self.settings.timeout:g} s", retry=True
                )
            file.write(block)
        if size < expected:
            raise DownloadError("truncated", f"{size} of {expected} bytes", retry=True)
        return size


def _damage(path: Path) -> str | None:
    """Why `path` is no whole picture, None if it is one. A small scale still reads every byte of a JPEG."""
    try:
        open_picture(path, min_side=64)
    except UnreadablePicture as error:
        return str(error)
    return None


def _retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number or a date; 0 when absent or neither."""
    try:
        if header is None or header.strip().isdecimal():
            return float(header or 0)
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


def download_all(links: dict[str, str], download: Downloader) -> dict[str, Outcome]:
    """Fetch every image of `links` (file name to link). After Ctrl-C the rest is "interrupted"."""
    failed, futures = 0, {}
    with ThreadPoolExecutor(download.settings.workers) as pool:
        try:  # from the first submit on: leaving the pool by an exception would wait for all downloads
            for image, link in links.items():
                futures[image] = pool.submit(download, image, link)
            finished = as_completed(futures.values())
            with tqdm(finished, total=len(links), desc="pictures", unit=" pictures") as progress:
                for future in progress:
                    failed += future.result().status not in ("ok", "present")
                    progress.set_postfix(failed=failed, refresh=False)
        except BaseException as error:
            download.stop.set()
            pool.shutdown(cancel_futures=True)
            if not isinstance(error, KeyboardInterrupt):
                raise
    done = {image: future.result() for image, future in futures.items() if not future.cancelled()}
    return {image: done.get(image, Outcome("interrupted")) for image in links}


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(DownloadSettings, argv, description=__doc__.split("\n")[0])
    workspace = Workspace(settings.workspace)
    rows = pd.concat([workspace.prepared(split) for split in SPLITS], ignore_index=True)
    strange = rows.loc[rows["image"].map(lambda name: name != Path(name).name or name == ".."), "sample_id"]
    if len(strange):
        raise InputError(f"prepared table: image of sample_id {strange.iloc[0]} is not a plain file name")
    folder = Path(settings.images) if settings.images else workspace.images_folder()
    folder.mkdir(parents=True, exist_ok=True)

    links = dict(zip(rows["image"], rows["image_link"].str.strip(), strict=True))
    links.pop("", None)
    download = Downloader(folder, settings)
    outcomes = {"": Outcome("no_link")} | download_all(links, download)
    table = rows[["sample_id", "image"]].assign(
        status=[outcomes[image].status for image in rows["image"]],
        detail=[outcomes[image].detail for image in rows["image"]],
    )
    with atomic_write(workspace.path("image_status")) as file:
        table.to_csv(file, index=False)

    listed = ", ".join(f"{count} {status}" for status, count in table["status"].value_counts().items())
    print(f"{len(rows)} rows, {len(links)} pictures: {listed}; see {workspace.path('image_status')}")
    if download.stop.is_set():
        raise SystemExit(130)


if __name__ == "__main__":
    run_entry_point(main)
