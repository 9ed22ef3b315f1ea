"""A boundary of the pyramid in plain PyTorch, for one sample: route, pool, scale."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from dpn_rt.errors import RequestError
from dpn_rt.model.reduction.grid import num_visual, pooled_grid
from dpn_rt.model.reduction.pooling_config import BoundaryConfig, PoolingConfig, RouterVersion
from dpn_rt.reference.trace import BoundaryRecord, SampleLayout

ROUTER_TEMPERATURE = 10.0
MIN_DRAWN_VISUAL_TOKENS = 18
"""The published value, for images of 576 visual tokens."""


class Router(nn.Module):
    """Computes the probabilities of the experts from one row. It is float32 in models of any dtype."""

    def __init__(self, hidden_size: int, num_experts: int, version: RouterVersion) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5) if version == "v1" else None
        self.hidden = nn.Linear(hidden_size, hidden_size // 4, bias=False) if version == "v1" else None
        self.predictor = nn.Linear(hidden_size // 4 if version == "v1" else hidden_size, num_experts, bias=False)
        for linear in (self.hidden, self.predictor):
            if linear is not None:
                nn.init.normal_(linear.weight, std=0.02)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Probabilities [num_experts] float32 from the router rows [num_router_rows, hidden_size]."""
        with torch.autocast(rows.device.type, enabled=False):
            x = rows.float().mean(dim=0)
            if self.norm is not None and self.hidden is not None:
                x = F.layer_norm(x, x.shape, self.norm.weight.float(), self.norm.bias.float(), self.norm.eps)
                x = F.gelu(F.linear(x, self.hidden.weight.float()))
            logits = F.linear(x, self.predictor.weight.float())
            return torch.softmax(logits / ROUTER_TEMPERATURE, dim=-1)


class Boundary(nn.Module):
    """Replaces the visual rows of one sample by fewer, on the output of layer `config.layer`."""

    def __init__(self, config: BoundaryConfig, pooling: PoolingConfig, hidden_size: int) -> None:
        super().__init__()
        self.config, self.pooling = config, pooling
        self.detach_router_input = False
        """Whether the router's gradient stops before the decoder (published as `detach_cls_token_to_predict`)."""
        self.min_drawn_visual_tokens = MIN_DRAWN_VISUAL_TOKENS
        """In training, an expert that would leave fewer visual tokens is drawn again."""
        self.router = (
            Router(hidden_size, config.num_experts, pooling.router_version)
            if pooling.pooling_type == "adaptive"
            else None
        )
        self.experts = nn.ModuleList()
        if pooling.pooling_function == "conv":
            for kernel in config.kernels:
                self.experts.append(
                    nn.Conv2d(hidden_size, hidden_size, kernel, stride=kernel, groups=hidden_size, bias=False)
                )
        areas = sorted({height * width for height, width in config.kernels})
        self.scores = tuple(areas.index(height * width) for height, width in config.kernels)

    def skips(self, layout: SampleLayout) -> bool:
        """Whether the boundary skips the sample, which has no image or too few visual tokens."""
        return layout.num_visual < self.config.min_visual_tokens

    def forward(
        self, hidden: torch.Tensor, layout: SampleLayout, forced: int | None = None
    ) -> tuple[torch.Tensor, SampleLayout, BoundaryRecord]:
        """Route and pool one sample.

        Args:
            hidden: [num_rows, hidden_size], the output of the pooling layer.
            layout: where the visual rows and router rows are.
            forced: expert to take instead of the router's choice.

        Returns:
            The rows of the next stage [new_num_rows, hidden_size], their layout, and a record of the choice.

        Raises:
            RequestError: the expert's kernel is larger than the grid.
        """
        if layout.grid is None or self.skips(layout):
            return hidden, layout, BoundaryRecord(None, None, None, self.scores)
        probs = None
        if self.router is not None:
            rows = hidden[list(layout.router_rows)]
            probs = cast(torch.Tensor, self.router(rows.detach() if self.detach_router_input else rows))
        expert = self.choose(probs, layout.grid) if forced is None else forced
        kernel = self.config.kernels[expert]
        grid, fits = pooled_grid(layout.grid, kernel)
        if not fits:
            raise RequestError(
                f"the kernel {kernel} of expert {expert} after layer {self.config.layer} does not fit the grid of "
                f"visual tokens {layout.grid}; force another route or give an image with a larger grid"
            )
        visual = self.pool(hidden[layout.image_start : layout.image_end], layout.grid, expert)
        if probs is not None:
            visual = (visual.float() * probs[expert]).to(visual.dtype)
        packed = torch.cat((hidden[: layout.image_start], visual.to(hidden.dtype), hidden[layout.image_end :]))
        return packed, layout.with_grid(grid), BoundaryRecord(expert, kernel, probs, self.scores)

    def choose(self, probs: torch.Tensor | None, grid: tuple[int, int]) -> int:
        """The expert of one sample.

        In eval mode it is the argmax of `probs` [num_experts]; in training it is drawn from them. Without `probs` it is
        drawn uniformly for pooling_type "random"; otherwise it is expert 0.
        """
        if probs is None:
            return int(torch.randint(self.config.num_experts, ())) if self.pooling.pooling_type == "random" else 0
        if not self.training:
            return int(probs.argmax())
        # The published code draws again until enough tokens are left. That equals one draw among the experts that leave
        # enough. Where no expert does (16 or 17 tokens) the published loop does not end; here the mildest one is taken.
        left = [num_visual((pooled_grid(grid, kernel)[0],)) for kernel in self.config.kernels]
        allowed = torch.tensor([n >= self.min_drawn_visual_tokens for n in left], device=probs.device)
        if not allowed.any():
            return max(range(len(left)), key=left.__getitem__)
        return int(torch.multinomial(probs.detach() * allowed, 1))

    def pool(self, visual: torch.Tensor, grid: tuple[int, int], expert: int) -> torch.Tensor:
        """Pool [h*w, hidden_size] with the expert's kernel to [(h//kh)*(w//kw), hidden_size], not scaled."""
        image = visual.view(*grid, -1).permute(2, 0, 1).unsqueeze(0)
        kernel = self.config.kernels[expert]
        if self.pooling.pooling_function == "max":
            image = F.max_pool2d(image, kernel)
        elif self.pooling.pooling_function == "avg":
            image = F.avg_pool2d(image, kernel)
        else:
            image = self.experts[expert](image)
        return image[0].flatten(1).t()
