"""A saved system that prices any product.

    from pricing import PriceModel
    model = PriceModel.load("OUT")
    prices = model.predict(table)

Legend: N rows, J members of the ensemble.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from contracts.catalog import ColumnMapping
from contracts.embeddings import Embeddings
from contracts.errors import InputError
from contracts.files import read_json
from contracts.smape import SMALLEST_PRICE
from contracts.workspace import Workspace
from ensemble.saved import Ensemble
from pricing.parts import Encoder, EncoderSource, Pricer, open_member
from pricing.products import Products, one_product, products_of

if TYPE_CHECKING:
    from pricing.explain import Explanation, KnownProducts

FORMAT = 1
"""Version of exported folders."""
FORMAT_FILE = "pricing.json"
ENSEMBLE = "ensemble"


@dataclass
class Priced:
    """What the system says of N products, and how it came to it."""

    products: Products
    embeddings: dict[str, Embeddings]
    """by name; rows in the order of the products"""
    ln_by_member: np.ndarray
    """(N, J) ln of dollars"""
    prices: pd.DataFrame
    """sample_id, price, low_80, high_80, low_95, high_95, missing"""


class PriceModel:
    """Members, encoders and ensemble of a saved system, each opened once. Open one with `load`."""

    def __init__(self, root: Path, *, device: str = "auto"):
        self.root = root
        self.device = device
        self.workspace = Workspace(root)
        self.ensemble = Ensemble.load(self.workspace.path("run", name=ENSEMBLE))
        catalog = self.workspace.path("catalog")
        content = read_json(catalog) if catalog.is_file() else {}
        self.mapping = ColumnMapping.from_json(content)
        """columns of the tables that it prices"""
        self.images = Path(content.get("images_folder") or self.root / "data" / "images")
        """folder of the pictures, unless `predict` names another one"""
        self.members: list[Pricer] = [open_member(root, member, device) for member in self.ensemble.members]
        self.encoders: dict[str, EncoderSource] = {}
        """by the name of the embedding"""
        self._opened: dict[str, Encoder] = {}
        for member, opened in zip(self.ensemble.members, self.members, strict=True):
            for name in opened.embeddings:
                self._open_encoder(name, trained_with=opened.encoders.get(name), member=member.name)

    def _open_encoder(self, name: str, *, trained_with: str | None, member: str) -> None:
        """Open the encoder of an embedding, once, and check that it is still the one that the member was trained on."""
        if name not in self.encoders:
            self.encoders[name] = EncoderSource.read(self.root, name)
            self._opened[name] = self.encoders[name].open(self.root, self.device)
        checkpoint = self._opened[name].meta["checkpoint"]
        if checkpoint != (trained_with or self.encoders[name].meta["checkpoint"]):
            raise InputError(
                f"the encoder of the embedding {name} was trained again after the embedding was made; extract it "
                f"again, then train {member} again"
            )

    @classmethod
    def load(
        cls, name_or_path: str | Path, *, device: str = "auto", revision: str | None = None
    ) -> PriceModel:
        """Open a workspace, an exported folder or, if there is no such folder, a system on the Hugging Face hub.

        Raises:
            InputError: no ensemble, a part of it is missing, or a folder of another version.
        """
        root = Path(name_or_path).expanduser()
        if not root.is_dir():
            root = _download(str(name_or_path), revision)
        stated = root / FORMAT_FILE
        if stated.is_file() and (version := read_json(stated).get("format")) != FORMAT:
            raise InputError(f"{stated}: format {version!r}, this version reads {FORMAT}; export it again")
        return cls(root, device=device)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Any) -> PriceModel:
        """`load`, under the name that the hub's libraries use."""
        return cls.load(name_or_path, **options)

    def push_to_hub(self, repo_id: str, *, private: bool = True, **options: Any) -> str:
        """Export the system and upload the folder; returns its address.

        Args:
            repo_id: owner/name.
            options: of `pricing.export.export`: known_products, license.

        Raises:
            InputError: the hub refuses (no token, no right to write) or is not reachable.
        """
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        from pricing.export import export

        hub = HfApi()
        with TemporaryDirectory() as folder:
            target = export(self.root, Path(folder) / "system", **options)
            try:
                hub.create_repo(repo_id, private=private, exist_ok=True)
                return str(hub.upload_folder(repo_id=repo_id, folder_path=target))
            except Exception as error:  # the hub client raises many unrelated types
                raise InputError(f"{repo_id}: not uploaded ({_one_line(error)})") from None

    def predict(self, table: pd.DataFrame, *, images: Path | str | None = None) -> pd.DataFrame:
        """Price the rows of a table.

        Args:
            table: with the columns that the system was trained on (`mapping`), the price excepted, or a prepared
                table. Ids may repeat; without a column of ids, the rows are numbered.
            images: folder of the pictures; None takes that of the workspace.

        Returns:
            sample_id, price, low_80, high_80, low_95, high_95 (in the currency of the training prices) and `missing`,
            which lists what the price had to do without ("picture", "text", "amount"); rows as in `table`.

        Raises:
            InputError: a mapped column is missing, or the table has no rows.
        """
        return self.price(products_of(table, self.mapping), images=images).prices

    def predict_one(self, text: str, image: Path | str | None = None) -> pd.Series:
        """Price one product by its text and, where there is one, its picture file; see `predict`."""
        product = one_product(text, self.mapping, None if image is None else Path(image))
        return self.price(product).prices.iloc[0]

    def explain(
        self, row: pd.DataFrame | pd.Series | Mapping[str, Any], *, images: Path | str | None = None
    ) -> Explanation:
        """What moves the price of one product: the members' prices, words and fields, and similar known products."""
        from pricing.explain import explain

        table = row if isinstance(row, pd.DataFrame) else pd.DataFrame([dict(row)])
        if len(table) != 1:
            raise InputError(f"explain takes one product, not {len(table)}")
        return explain(self, products_of(table, self.mapping), images=images)

    @cached_property
    def known_products(self) -> KnownProducts | None:
        """The training products, read when they are first asked for; None where the system keeps none."""
        from pricing.explain import KnownProducts

        return KnownProducts.open(self)

    @property
    def reads_pictures(self) -> bool:
        return any(source.reads_pictures for source in self.encoders.values())

    def price(self, products: Products, *, images: Path | str | None = None) -> Priced:
        """Price prepared products. An embedding that several members read is computed once."""
        return self.price_encoded(products, self.encode(products, images=images))

    def encode(self, products: Products, *, images: Path | str | None = None) -> dict[str, Embeddings]:
        """The embeddings that the members read, by name; rows in the order of the products."""
        folder = Path(images) if images is not None else self.images
        return {name: encoder.encode(products.rows, folder) for name, encoder in self._opened.items()}

    def price_encoded(self, products: Products, embeddings: dict[str, Embeddings]) -> Priced:
        """Price prepared products by embeddings that are there already, see `encode`."""
        columns = []
        for member, opened in zip(self.ensemble.members, self.members, strict=True):
            ln_price = opened.ln_price(products.rows, embeddings)
            if not np.isfinite(ln_price).all():
                first = products.ids[~np.isfinite(ln_price)][0]
                raise InputError(
                    f"member {member.name}: the price of sample_id {first} is not a finite number"
                )
            columns.append(np.maximum(ln_price, np.log(SMALLEST_PRICE)))
        ln_by_member = np.stack(columns, axis=1)
        prices = self.ensemble.prices(products.ids, ln_by_member)
        prices.columns = prices.columns.str.removesuffix("%")
        prices["missing"] = self._missing(products, embeddings)
        return Priced(products, embeddings, ln_by_member, prices)

    def _missing(self, products: Products, embeddings: dict[str, Embeddings]) -> list[str]:
        """What each product lacks of what this system could read."""
        lacks = {"text": products.without_text, "amount": products.without_amount}
        pictures = [embeddings[name].valid for name, source in self.encoders.items() if source.reads_pictures]
        if pictures:
            lacks = {"picture": ~np.any(pictures, axis=0), **lacks}
        missing = []
        for row in range(len(products)):
            missing.append(", ".join(word for word, is_missing in lacks.items() if is_missing[row]))
        return missing


def _download(name: str, revision: str | None) -> Path:
    """The folder of a system on the hub. Raises InputError where there is none."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{name}: no such folder, and not a hub id such as owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{name}: no such folder, and not on the hub ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
