"""What is left to win over PyTorch's kernels: the products and the attention of a step, and nothing else of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from datasets import Dataset
from loops import Clock, Trained, matmul_precision
from measuring import Pass, Seconds
from workloads import Pair


@dataclass(frozen=True)
class Products:
    """Of the student's step: each linear layer and each attention forward and backward, on operands that lie ready.

    No embeddings, norms, activations, dropout, loss, clipping or optimizer. Attention is in float32, as it is on a CPU
    under bf16 where rows are short.

    Args:
        bf16: operands of the linear layers.
    """

    bf16: bool = False

    def on(self, pair: Pair, data: Dataset, size: int) -> Pass:
        """The pass over these rows, all of one length, in batches of so many."""
        student = pair.student(attention_dropout=0.0)
        tokens, dtype = len(data[0]["input_ids"]), torch.bfloat16 if self.bf16 else torch.float32
        layers = []
        for weight, rows in linear_layers(student, size, tokens):
            weight = weight.to(dtype).requires_grad_()
            inputs = torch.randn(rows, weight.shape[1], device=pair.device, dtype=dtype, requires_grad=True)
            layers.append((inputs, weight, torch.randn(rows, len(weight), device=pair.device, dtype=dtype)))
        heads, depth = student.config.n_heads, student.config.n_layers
        shape = (size, heads, tokens, student.config.dim // heads)
        query, key, value = (torch.randn(shape, device=pair.device, requires_grad=True) for _ in range(3))
        mixed = torch.randn(shape, device=pair.device)

        def once(seed: int) -> Seconds:
            clock = Clock(pair.device)
            with matmul_precision("highest"):
                clock.start()
                for _ in range(len(data) // size):
                    for inputs, weight, gradient in layers:
                        torch.autograd.grad(F.linear(inputs, weight), (inputs, weight), gradient)
                    for _ in range(depth):
                        output = F.scaled_dot_product_attention(query, key, value)
                        torch.autograd.grad(output, (query, key, value), mixed)
                return clock.stop()

        return once


def linear_layers(student: torch.nn.Module, size: int, tokens: int) -> list[tuple[torch.Tensor, int]]:
    """Weight of each linear layer, (out, in), and the rows that it is given of a batch; in the order of a pass."""
    found = []

    def seen(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
        found.append((module.weight.detach(), inputs[0].numel() // inputs[0].shape[-1]))

    hooks = [m.register_forward_pre_hook(seen) for m in student.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        student(torch.zeros(size, tokens, dtype=torch.long, device=student.device))
    for hook in hooks:
        hook.remove()
    return found


WAYS: dict[str, Trained | Products] = {
    "plain Trainer subclass: fp32, teacher live": Trained("plain"),
    "DistillationTrainer, KL, cached": Trained(teacher="cached", attention_dropout=0.0),
    "matrix products and attention of that step alone": Products(),
    "DistillationTrainer, KL, cached, bf16": Trained(teacher="cached", bf16=True, attention_dropout=0.0),
    "matrix products in bf16, and attention, alone": Products(bf16=True),
}
