"""Price error and retrieval over rows that the model was not fitted on.

N rows that are evaluated, D_in width of the joint image-text space.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from clip_finetune.config import ClipSettings
from clip_finetune.model import PriceClip
from clip_finetune.pictures import Data, load_batches, split
from contracts.smape import smape
from training.run_folder import Diverged


def evaluate(
    model: PriceClip, data: Data, rows: np.ndarray, settings: ClipSettings, accelerator: Accelerator
) -> dict[str, float]:
    """Metrics over the given rows, the same on every process: smape (with a price head), contrastive, recall@k.

    Retrieval looks for a picture's own text among the texts of all `rows`. Without rows there are no metrics.

    Raises:
        Diverged: the model no longer gives finite numbers.
    """
    if len(rows) == 0:
        return {}
    features = encode_rows(model, data, rows, settings, accelerator)
    price = np.expm1(features["log_price"]) if "log_price" in features else np.empty(0)
    if not all(np.isfinite(values).all() for values in (price, *features.values())):
        raise Diverged(
            f"{settings.run}: the model gives NaN for a picture or text; lower --lr or use --precision fp32"
        )
    metrics = {}
    if model.price_head is not None:
        metrics["smape"] = smape(data.table["price"].to_numpy()[rows], price)
    image = torch.from_numpy(features["image"]).to(accelerator.device)
    text = torch.from_numpy(features["text"]).to(accelerator.device)
    return metrics | retrieval(image, text, model.clip.logit_scale.exp().detach())


def retrieval(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> dict[str, float]:
    """contrastive (the loss with all N rows as one batch), recall@1 and recall@10; image and text are (N, D_in)."""
    loss = 0.0
    ranks = []
    # in parts, because the (N, N) similarities of all rows may not fit into memory
    for part in torch.arange(len(image), device=image.device).split(4096):
        to_text = image[part] @ text.T
        to_image = text[part] @ image.T
        loss += F.cross_entropy(scale * to_text, part, reduction="sum").item()
        loss += F.cross_entropy(scale * to_image, part, reduction="sum").item()
        own = to_text.gather(1, part[:, None])
        ranks.append((to_text > own).sum(dim=1))
    rank = torch.cat(ranks)
    recall = {f"recall@{k}": (rank < k).float().mean().item() for k in (1, 10)}
    return {"contrastive": loss / (2 * len(image)), **recall}


def encode_rows(
    model: PriceClip, data: Data, rows: np.ndarray, settings: ClipSettings, accelerator: Accelerator
) -> dict[str, np.ndarray]:
    """image and text (N, D_in) and, with a price head, log_price (N,), in the order of `rows`."""
    number = accelerator.process_index
    processes = accelerator.num_processes
    device = accelerator.device
    batches = split(rows[number::processes], settings.batch_size)
    found: dict[str, list[np.ndarray]] = {"image": [], "text": [], "log_price": []}
    model.eval()
    with torch.no_grad():
        loader = load_batches(data.rows, batches, settings.workers, device)
        for batch in tqdm(loader, "evaluating", leave=False, disable=not accelerator.is_main_process):
            with accelerator.autocast():
                image = model.encode_image(batch["picture"].to(device))
                text = model.encode_text(batch["tokens"].to(device))
            found["image"].append(image.cpu().numpy())
            found["text"].append(text.cpu().numpy())
            if model.price_head is not None:
                found["log_price"].append(model.price_head.predict(image).cpu().numpy())
    own = {name: np.concatenate(parts) for name, parts in found.items() if parts}

    # process k of W encoded the rows k, k + W, k + 2W, …
    result: dict[str, np.ndarray] = {}
    for process, features in gather_object([(number, own)]):
        for name, values in features.items():
            whole = result.setdefault(name, np.empty((len(rows), *values.shape[1:]), np.float32))
            whole[process::processes] = values
    return result
