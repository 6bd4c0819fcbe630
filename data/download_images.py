"""Download the pictures of the prepared tables; run it again to continue.

    python -m data.download_images --workspace OUT --workers 16 --deadline 3600

Missing pictures are normal: every row gets a line in data/image_status.csv, and the command succeeds whatever the lines
say. The status of a row is one of

    ok            fetched now
    present       was in the folder and is a whole picture
    no_link       the row has no link
    bad_link      the link is not http or https, or not a link
    not_public    the host is none of the public internet; --allow-private fetches from one's own network
    http_404      the server's answer; likewise for other codes
    timeout       the server was silent, or headers and picture took too long
    unreachable   no connection
    truncated     the server sent less than it had announced
    too_large     more than --max-bytes
    not_an_image  the file cannot be decoded as a picture
    deadline      no time was left
    interrupted   Ctrl-C came before
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
from http import HTTPStatus
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import quote, urlsplit

import pandas as pd
from tqdm import tqdm

from contracts.errors import EXIT_INTERRUPTED, InputError, run_entry_point
from contracts.files import atomic_write
from contracts.tables import without_formulas
from contracts.workspace import REPOSITORY, Workspace
from data.public_addresses import Limit, NotPublic, PublicOpener
from training.pictures import UnreadablePicture, open_picture
from training.settings import parse_settings

FIRST_BACKOFF = 1.0
"""Seconds before the first retry; they double with each further one."""
TIMEOUTS_PER_PICTURE = 6
"""A whole picture may take this many times --timeout."""
BLOCK = 65_536
"""Most bytes per read."""
DECODED_SIDE = 64
"""Pixels of the shorter side when a picture is checked: a small scale decodes faster and still reads every byte."""
SHORTEST_TIMEOUT = 0.001
"""Seconds; a timeout of 0 would make the socket non-blocking."""
LINK_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"
"""Characters that are left as they are in a link; % is one, so that a quoted link is not quoted again."""
# without a bare OSError: a full disk must end the run and not become a missing picture
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
    workspace: Path = REPOSITORY
    """Folder with data/prepared_train.csv and data/prepared_test.csv."""
    images: Path | None = None
    """Folder that receives the pictures; by default the images folder named in data/catalog.json."""
    workers: int = 16
    """Downloads at the same time."""
    retries: int = 3
    """Further attempts after an answer 429 or 5xx, a timeout or a broken connection."""
    timeout: float = 10.0
    """Seconds a server may stay silent; a whole picture may take six times that."""
    deadline: float = 3600.0
    """Seconds for all pictures; those left then are for the next run."""
    max_bytes: int = 20_000_000
    """Size of the largest picture that is accepted."""
    allow_private: bool = False
    """Fetch from private, loopback and link-local addresses, too, or through the proxy that the environment names.
    A link from outside can then reach services that only your own network should reach."""

    def __post_init__(self) -> None:
        smallest = {"workers": 1, "retries": 0, "timeout": SHORTEST_TIMEOUT, "deadline": 0, "max_bytes": 1}
        for name, least in smallest.items():
            value = getattr(self, name)
            if not value >= least:  # this way round, NaN is refused too
                raise InputError(f"--{name.replace('_', '-')} {value}: must be {least} or more")


class Outcome(NamedTuple):
    """One row of image_status.csv: a status of the list above, and what there is to say about it."""

    status: str
    detail: str = ""


class DownloadError(Exception):
    """One attempt failed; `retry` says whether another one may help, not before `wait` seconds."""

    def __init__(self, status: str, detail: str = "", *, retry: bool = False, wait: float = 0.0):
        super().__init__(status, detail)
        self.outcome = Outcome(status, detail)
        self.retry = retry
        self.wait = wait


class Downloader:
    """Fetches pictures into `folder` until `settings.deadline` seconds from now, or until `stop` is set."""

    def __init__(self, folder: Path, settings: DownloadSettings):
        self.folder = folder
        self.settings = settings
        self.opener = PublicOpener(allow_private=settings.allow_private)
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
            except DownloadError as error:
                wait = max(_backoff(attempt), error.wait)
                is_last = attempt > self.settings.retries or time.monotonic() + wait > self.ends
                if is_last or not error.retry:
                    return error.outcome
                self.stop.wait(wait)
            else:
                attempts = "1 attempt" if attempt == 1 else f"{attempt} attempts"
                return Outcome("ok", f"{size} bytes, {attempts}")
        return late

    def _out_of_time(self) -> Outcome | None:
        if self.stop.is_set():
            return Outcome("interrupted")
        return Outcome("deadline") if time.monotonic() >= self.ends else None

    def _fetch(self, link: str, path: Path) -> int:
        """One attempt: stream to a temporary name, check that it is a picture, rename it. Returns its size in bytes.

        Raises DownloadError for whatever a server, a link or the network does wrong.
        """
        part = path.with_name(f".{path.name}.part")
        silence = min(self.settings.timeout, self.ends - time.monotonic())
        silence = max(silence, SHORTEST_TIMEOUT)
        try:
            if urlsplit(link).scheme not in ("http", "https"):
                raise DownloadError("bad_link", "not http or https")
            request = urllib.request.Request(quote(link, safe=LINK_CHARACTERS), headers=HEADERS)
            with self.opener.limit(self._seconds_left()) as limit:
                try:
                    with self.opener.open(request, timeout=silence) as response, part.open("wb") as file:
                        size = self._stream(response, file, limit)
                except (*NETWORK_ERRORS, ValueError):
                    self._require_time(limit)  # an answer that was cut off fails in many ways
                    raise
            if damage := _damage(part):
                raise DownloadError("not_an_image", damage)
            os.replace(part, path)
            return size
        except urllib.error.HTTPError as error:
            error.close()
            wait = _retry_after(error.headers.get("Retry-After"))
            retry = (
                error.code == HTTPStatus.TOO_MANY_REQUESTS or error.code >= HTTPStatus.INTERNAL_SERVER_ERROR
            )
            raise DownloadError(f"http_{error.code}", str(error.reason), retry=retry, wait=wait) from None
        except (http.client.InvalidURL, ValueError) as error:
            raise DownloadError("bad_link", str(error)) from None
        except NETWORK_ERRORS as error:
            reason = getattr(error, "reason", error)  # a URLError wraps the real error
            if isinstance(reason, NotPublic):
                raise DownloadError("not_public", str(reason)) from None
            if late := self._out_of_time():
                raise DownloadError(*late) from None
            if isinstance(reason, TimeoutError):
                raise DownloadError("timeout", f"silent for {silence:g} s", retry=True) from None
            raise DownloadError("unreachable", f"{type(reason).__name__}: {reason}", retry=True) from None
        finally:
            part.unlink(missing_ok=True)

    def _seconds_left(self) -> float:
        """For one attempt, from connecting to the last byte."""
        left = min(TIMEOUTS_PER_PICTURE * self.settings.timeout, self.ends - time.monotonic())
        return max(left, SHORTEST_TIMEOUT)

    def _require_time(self, limit: Limit) -> None:
        """Raises DownloadError where an attempt has had all its time."""
        if late := self._out_of_time():
            raise DownloadError(*late)
        if limit.over:
            seconds = TIMEOUTS_PER_PICTURE * self.settings.timeout
            raise DownloadError("timeout", f"not complete after {seconds:g} s", retry=True)

    def _stream(self, response: http.client.HTTPResponse, file: IO[bytes], limit: Limit) -> int:
        """Copy the body of an answer to `file`; returns its size in bytes."""
        largest = self.settings.max_bytes
        announced = response.headers.get("Content-Length", "")
        expected = int(announced) if announced.isdecimal() else 0
        if expected > largest:
            raise DownloadError("too_large", f"{expected} bytes announced, --max-bytes is {largest}")
        size = 0
        # read1 returns what has arrived, whereas read would wait for a full block, however long that takes
        while block := response.read1(BLOCK):
            size += len(block)
            if size > largest:
                raise DownloadError("too_large", f"more than --max-bytes {largest}")
            self._require_time(limit)
            file.write(block)
        self._require_time(limit)  # the end of the answer may be that of the connection
        if size < expected:
            raise DownloadError("truncated", f"{size} of {expected} bytes", retry=True)
        return size


def _backoff(attempt: int) -> float:
    """Seconds to wait after failed attempt 1, 2, …; random, so that refused workers do not all come back at once."""
    return FIRST_BACKOFF * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)


def _damage(path: Path) -> str | None:
    """Why `path` is no whole picture, or None if it is one."""
    try:
        open_picture(path, min_side=DECODED_SIDE)
    except UnreadablePicture as error:
        return str(error)
    return None


def _retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 for none and for anything else."""
    if header is None:
        return 0.0
    if header.strip().isdecimal():
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    return max(0.0, date.timestamp() - time.time())


def download_all(links: dict[str, str], download: Downloader) -> dict[str, Outcome]:
    """Fetch every picture of `links` (file name to link). After Ctrl-C, those that are left are "interrupted"."""
    failed = 0
    futures = {}
    with ThreadPoolExecutor(download.settings.workers) as pool:
        # The try begins before the first submit: leaving the pool by an exception would wait for all downloads.
        try:
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
    outcomes = {image: Outcome("interrupted") for image in links}
    for image, future in futures.items():
        if not future.cancelled():
            outcomes[image] = future.result()
    return outcomes


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(DownloadSettings, argv, description=__doc__.split("\n")[0])
    workspace = Workspace(settings.workspace)
    tables = workspace.tables()
    if not tables:
        raise InputError(f"{workspace.root}: no prepared table; run python -m data.prepare first")
    rows = pd.concat([workspace.prepared(name) for name in tables], ignore_index=True)
    _require_plain_names(rows)
    folder = settings.images or workspace.images_folder()
    folder.mkdir(parents=True, exist_ok=True)

    links = {}
    for image, link in zip(rows["image"], rows["image_link"].str.strip(), strict=True):
        if image:
            links[image] = link
    download = Downloader(folder, settings)
    outcomes = download_all(links, download)
    outcomes[""] = Outcome("no_link")

    table = rows[["sample_id", "image"]].assign(
        status=[outcomes[image].status for image in rows["image"]],
        detail=[outcomes[image].detail for image in rows["image"]],
    )
    status_file = workspace.path("image_status")
    with atomic_write(status_file) as file:
        without_formulas(table).to_csv(file, index=False)
    counts = table["status"].value_counts()
    listed = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{len(rows)} rows, {len(links)} pictures: {listed}; see {status_file}")
    if download.stop.is_set():
        raise SystemExit(EXIT_INTERRUPTED)


def _require_plain_names(rows: pd.DataFrame) -> None:
    """Raise InputError for a picture that would be written outside its folder."""
    for sample_id, image in zip(rows["sample_id"], rows["image"], strict=True):
        if image == ".." or image != Path(image).name:
            raise InputError(
                f"prepared table: image of sample_id {sample_id} is not a plain file name: {image!r}"
            )


if __name__ == "__main__":
    run_entry_point(main)
