import pytest
import torch
import torch.nn.functional as F

from clip_finetune.loss import contrastive_loss
from training.device import guard_torchvision

guard_torchvision()
from clip_finetune.evaluation import retrieval  # noqa: E402


def test_recall_by_hand():
    """Twelve texts along a quarter circle; pictures 0 to 8 sit on their own text, the others on text 0."""
    angle = torch.linspace(0, torch.pi / 2, 12)
    text = torch.stack([angle.cos(), angle.sin()], dim=1)
    image = torch.cat([text[:9], text[:1].expand(3, 2)])
    metrics = retrieval(image, text, torch.tensor(5.0))
    # seen from text 0, texts 9, 10 and 11 have ranks 9, 10 and 11: only the first is within ten
    assert metrics["recall@1"] == pytest.approx(9 / 12) and metrics["recall@10"] == pytest.approx(10 / 12)


def test_contrastive_is_the_loss_of_one_batch():
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(5000, 3), dim=1) for _ in range(2))  # two parts
    scale = torch.tensor(5.0)
    expected = contrastive_loss(image, text, scale).item()
    assert retrieval(image, text, scale)["contrastive"] == pytest.approx(expected, rel=1e-5)
