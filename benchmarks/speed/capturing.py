"""Attention and hidden-state losses by our capture, and in the usual way: eager maps, returned and compared.

The usual way has both models on eager attention, asks each for all of its hidden states and maps, and takes
`F.mse_loss` (of maps also `F.kl_div`) over those of the mapped layers, with the mean over layers. Of relations (Q-Q,
K-K, V-V, as MiniLMv2 has them) the usual way keeps what the projections give by hooks, on fused attention, and compares
whole maps. Rows have no padding, so that its means without a mask are ours with one. Attention dropout is 0: with it
the student's returned maps would be those after dropout, and fused attention would take its slow path on a CPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from datasets import Dataset
from loops import LEARNING_RATE, Clock, matmul_precision
from measuring import Figures, Pass, Seconds, in_a_process_of_its_own, measured
from memory import peak_of, return_freed_memory
from plain import TEMPERATURE, divergence
from workloads import Pair, fixed_rows

from distill_nlp import (
    AttentionLoss,
    DistillationModel,
    DistillationObjective,
    HiddenStateLoss,
    KLDivergenceLoss,
    TokenRelationLoss,
)
from distill_nlp.layer_mapping import map_layers
from distill_nlp.teacher import bind_teacher

Batch = dict[str, torch.Tensor]
LossOf = Callable[[Batch], torch.Tensor]
MIB = 2**20


@dataclass(frozen=True)
class Featured:
    """A bare loop with KL + hidden + attention, or KL + relations, each with the weight 1; in float32.

    Args:
        way: "capture", "eager", or "kl": the KL divergence alone, on fused attention.
        layers: that are compared, "uniform" (all of the student's) or "last".
        maps: how attention maps are compared, "mse" or "kl"; "relations": those instead, without hidden states.
    """

    way: str
    layers: str = "uniform"
    maps: str = "mse"

    def on(self, pair: Pair, data: Dataset, size: int) -> Pass:
        """The pass over these rows, all of one length, in batches of so many."""
        student, loss_of = self.loss_on(pair)
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
        data = data.with_format("torch", device=pair.device)

        def once(seed: int) -> Seconds:
            clock = Clock(pair.device)
            with matmul_precision("highest"):
                clock.start()
                for first in range(0, len(data), size):
                    loss_of(data[first : first + size]).backward()
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                return clock.stop()

        return once

    def loss_on(self, pair: Pair) -> tuple[torch.nn.Module, LossOf]:
        """What is trained, and its loss."""
        student, teacher = pair.student(attention_dropout=0.0), pair.teacher()
        if self.way == "eager":
            if self.maps == "relations":
                return student, whole_relations(student, teacher, self.layers)
            return student, self._eager(student, teacher)
        losses = {"kl": KLDivergenceLoss(TEMPERATURE)}
        if self.way == "capture" and self.maps == "relations":
            losses |= {"relations": TokenRelationLoss(layers=self.layers, relation_heads=heads_of(student, teacher))}
        elif self.way == "capture":
            losses |= {"hidden": HiddenStateLoss(layers=self.layers)}
            losses |= {"attention": AttentionLoss(layers=self.layers, kind=self.maps)}
        objective = DistillationObjective(losses)
        model = DistillationModel(student, objective, teacher.config).train()
        answers = bind_teacher(teacher, student.config, objective)
        return model, lambda batch: model(teacher=answers(batch), **batch).loss

    def _eager(self, student: torch.nn.Module, teacher: torch.nn.Module) -> LossOf:
        for model in (student, teacher):
            model.set_attn_implementation("eager")
        depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers
        pairs = map_layers(self.layers, *depths)

        def loss_of(batch: Batch) -> torch.Tensor:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                target = teacher(**inputs, output_hidden_states=True, output_attentions=True)
            output = student(**inputs, output_hidden_states=True, output_attentions=True)
            # Of states, the first one is the embeddings' output.
            hidden = sum(F.mse_loss(output.hidden_states[s], target.hidden_states[t]) for s, t in pairs)
            attention = sum(self._between(output.attentions[s - 1], target.attentions[t - 1]) for s, t in pairs)
            return divergence(output.logits, target.logits) + (hidden + attention) / len(pairs)

        return loss_of

    def _between(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Of two layers' maps, (B, A, S, S) each."""
        if self.maps == "mse":
            return F.mse_loss(student, teacher)
        # A probability of 0 has no logarithm.
        logs = student.clamp(min=torch.finfo(student.dtype).tiny).log()
        return F.kl_div(logs, teacher, reduction="sum") / student.shape[:-1].numel()


def heads_of(student: torch.nn.Module, teacher: torch.nn.Module) -> int:
    """Relation heads that fit both."""
    return math.gcd(student.config.num_attention_heads, teacher.config.num_attention_heads)


def whole_relations(student: torch.nn.Module, teacher: torch.nn.Module, layers: str) -> LossOf:
    """KL divergence, and that between the maps of queries, keys and values with themselves: (B, R, S, S) each, kept."""
    heads = heads_of(student, teacher)
    pairs = map_layers(layers, student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    kept: dict[tuple[str, int, int], torch.Tensor] = {}

    def keep(key: tuple[str, int, int]) -> Callable[..., None]:
        return lambda module, inputs, output: kept.__setitem__(key, output)

    blocks = {"student": student.distilbert.transformer.layer, "teacher": teacher.bert.encoder.layer}
    for whose, own in blocks.items():
        for layer, block in enumerate(own, 1):
            attention = block.attention if whose == "student" else block.attention.self
            names = ("q_lin", "k_lin", "v_lin") if whose == "student" else ("query", "key", "value")
            for i, name in enumerate(names):
                getattr(attention, name).register_forward_hook(keep((whose, layer, i)))

    def relation(vectors: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = vectors.shape
        cut = vectors.view(batch, tokens, heads, width // heads).transpose(1, 2)
        return torch.log_softmax(cut @ cut.transpose(-1, -2) / (width // heads) ** 0.5, dim=-1)

    def loss_of(batch: Batch) -> torch.Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            target = teacher(**inputs).logits
        logits = student(**inputs).logits
        total = 0.0
        for s, t in pairs:
            for i in range(3):
                with torch.no_grad():
                    goal = relation(kept["teacher", t, i])
                found = relation(kept["student", s, i])
                kl = F.kl_div(found, goal, reduction="sum", log_target=True)
                total = total + kl / found.shape[:-1].numel()
        kept.clear()
        return divergence(logits, target) + total / len(pairs)

    return loss_of


def costs(pair: Pair, size: int, tokens: int, count: int, layers: str, maps: str, rounds: int) -> dict[str, Figures]:
    """Time of passes over `count` rows, relative to eager, and the memory of a step that KL alone does not take.

    Args:
        pair: of models.
        size, tokens: of a batch.
        count: rows of a pass.
        layers, maps: see `Featured`.
        rounds: of passes that count.
    """
    usual = "eager, maps returned" if maps != "relations" else "whole maps, kept"
    ways = {
        usual: Featured("eager", layers, maps),
        "capture": Featured("capture", layers, maps),
        "KL alone": Featured("kl"),
    }
    data = fixed_rows(count, tokens)
    found = measured({name: way.on(pair, data, size) for name, way in ways.items()}, rounds)
    peaks = {name: peak(way, pair, size, tokens) for name, way in ways.items()}
    above = {name: value - peaks["KL alone"] for name, value in peaks.items()}
    eager = above[usual]
    for name, figures in found.items():
        figures["peak_mib"] = peaks[name] / MIB
        if name != "KL alone":
            figures["above_kl_mib"] = above[name] / MIB
            # Where it is little, the ratio is noise.
            figures["memory_ratio"] = above[name] / eager if eager > MIB else None
    return found


def peak(way: Featured, pair: Pair, size: int, tokens: int) -> int:
    """Most bytes that a step holds above what the process held before it, in a process of its own.

    On the CPU it is the peak of the resident set (VmHWM, which is set back before the step) less that set then, of a
    process that has made two steps, so that the optimizer's state is there. The C library keeps freed memory for later,
    which would hide what a step needs: here it has one arena, and gives blocks of 1 MiB and more back at once.
    """
    with mock.patch.dict(os.environ, MALLOC_ARENA_MAX="1"):
        return in_a_process_of_its_own(peak_here, way, pair, size, tokens)


def peak_here(way: Featured, pair: Pair, size: int, tokens: int) -> int:
    """The same of this process."""
    return_freed_memory(at_once=True)
    step = way.on(pair, fixed_rows(size, tokens), size)
    for seed in range(2):
        step(seed)
    return peak_of(lambda: step(2), pair.device)
