"""One training step: its share of a batch through the model, the loss, the gradients of all processes, AdamW.

Legend: B batch, M modalities.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusion.config import TrainingSettings
from fusion.dataset import FusionTable
from fusion.processes import own_share, whole_batch
from fusion.target import Target
from training.processes import process, reduce_gradients


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> None:
    """nn.utils.clip_grad_norm_, with a faster norm on a CPU.

    torch takes the norm of one tensor on one thread there. A dot product of the gradient with itself uses all
    threads.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients[0].device.type == "cpu":
        flat = [gradient.flatten() for gradient in gradients]
        squares = [gradient.dot(gradient) for gradient in flat]
        norm = torch.stack(squares).sum().sqrt()
    else:
        norm = nn.utils.get_total_norm(gradients)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


class TrainingStep:
    """One step of AdamW on rows of a table that lies on the model's device.

    With `settings.compile` the model is compiled, and on CUDA the whole step is recorded as a CUDA graph: its
    hundreds of small kernels then start as one.
    """

    def __init__(self, model: nn.Module, table: FusionTable, target: Target, settings: TrainingSettings):
        self.table = table
        self.target = target
        self.settings = settings
        self.device = table.valid.device
        self.log_price = table.log_price.to(self.device)
        self.parameters = list(model.parameters())
        self.module = model
        if settings.compile:
            torch.compiler.reset()  # after eight compiled models, a ninth would silently run uncompiled
        self.model = torch.compile(model, dynamic=False) if settings.compile else model
        on_cuda = self.device.type == "cuda"
        self.use_bf16 = settings.precision == "bf16" or (settings.precision == "auto" and on_cuda)
        self.is_recorded = settings.compile and on_cuda and process()[1] == 1
        # a graph reads the learning rate from the device: from a tensor, which the scheduler changes in place
        lr = torch.tensor(settings.lr, device=self.device) if self.is_recorded else settings.lr
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr, weight_decay=settings.weight_decay, fused=True, capturable=self.is_recorded
        )
        self.run = CudaGraph(self.eager, settings.batch_size) if self.is_recorded else self.eager

    def __call__(self, rows: Tensor, visible: Tensor) -> Tensor:
        """Take the step on a whole batch, of which this process computes its share.

        Args:
            rows: positions (B,) in the table.
            visible: (B, M) bool, the embeddings that the model may see.

        Returns:
            The loss of the batch, a scalar on the device. A recorded step writes each loss to the same place.
        """
        return self.run(rows, visible)

    def eager(self, rows: Tensor, visible: Tensor) -> Tensor:
        """The step, kernel by kernel."""
        share = own_share()
        embeddings, _ = self.table.take(rows[share])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.use_bf16):
            output = self.model(embeddings, visible[share])
        output = whole_batch(output, len(rows))
        loss = self.target.loss(output, self.log_price.index_select(0, rows))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        reduce_gradients(self.parameters, "sum")
        clip_gradients(self.parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        return loss.detach()

    def set_learning_rate(self, lr: float) -> None:
        """Take the next steps with this learning rate, a recorded step included."""
        group = self.optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

    def load_optimizer(self, state: dict) -> None:
        """Continue with the optimizer of a checkpoint, which comes back on the CPU."""
        self.optimizer.load_state_dict(state)
        if self.is_recorded:
            group = self.optimizer.param_groups[0]
            group["lr"] = group["lr"].to(self.device)


class CudaGraph:
    """Records `step` on its fourth full batch, then replays it; other batch sizes run as they are."""

    WARM_UP = 3

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], batch_size: int):
        self.step = step
        self.batch_size = batch_size
        self.steps_before_recording = self.WARM_UP
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, rows: Tensor, visible: Tensor) -> Tensor:
        if len(rows) != self.batch_size:
            return self.step(rows, visible)
        if self.steps_before_recording > 0:
            self.steps_before_recording -= 1
            return self._on_side_stream(rows, visible)
        if self.graph is None:
            self.graph = self._record(rows, visible)
        # a graph reads and writes fixed places: the batch goes where the recorded one was
        self.rows.copy_(rows)
        self.visible.copy_(visible)
        self.graph.replay()
        return self.loss

    def _on_side_stream(self, rows: Tensor, visible: Tensor) -> Tensor:
        """A real step, in which libraries and optimizer allocate what they keep, on the side stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self.step(rows, visible)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def _record(self, rows: Tensor, visible: Tensor) -> torch.cuda.CUDAGraph:
        self.rows = rows.clone()
        self.visible = visible.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self.step(self.rows, self.visible)
        return graph
