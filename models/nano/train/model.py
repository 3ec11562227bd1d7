"""Qwen2-VL in plain torch, for training on a CPU: fixed shapes, plain batched products, bfloat16 weights.

Parameter names are those that Qwen publishes, so export is a copy. `Aux` holds the heads that only train.
Held against transformers' Qwen2VLForConditionalGeneration in float32 by the export test.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvl.models.nano.train.vision_input import MEAN, STD


@dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    rope_theta: float = 20.0
    mrope_section: tuple[int, int, int] = (8, 12, 12)
    rms_norm_eps: float = 1e-6
    depth: int = 5
    embed_dim: int = 256
    num_heads: int = 4
    mlp_ratio: int = 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x.float() * cos + rotate_half(x.float()) * sin).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class VisionAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scores = (q @ k.transpose(-1, -2)).float() * (d // self.heads) ** -0.5 + bias
        out = scores.softmax(-1).to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class VisionMLP(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))


class VisionBlock(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c.embed_dim, eps=1e-6), nn.LayerNorm(c.embed_dim, eps=1e-6)
        self.attn, self.mlp = (
            VisionAttention(c.embed_dim, c.num_heads),
            VisionMLP(c.embed_dim, c.embed_dim * c.mlp_ratio),
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, bias)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        wide = c.embed_dim * 4
        self.ln_q = nn.LayerNorm(c.embed_dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, c.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        return self.mlp(self.ln_q(x).view(b, n // 4, 4 * d))


class PatchEmbed(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, c.embed_dim, (2, 14, 14), (2, 14, 14), bias=False)


def grid_positions(grid: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Row and column of each of n patches, [b, n], 2x2 groups contiguous; grid is [b, 2] in merged tokens."""
    k = torch.arange(n)
    token, inner = k // 4, k % 4
    w = grid[:, 1:2]
    return 2 * (token // w) + inner // 2, 2 * (token % w) + inner % 2


class Vision(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.patch_embed, self.merger = PatchEmbed(c), Merger(c)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        half = c.embed_dim // c.num_heads // 2
        self.register_buffer("inv_freq", 1e4 ** -(torch.arange(0, half, 2).float() / half), persistent=False)
        self.register_buffer("mean", torch.tensor(MEAN).repeat_interleave(196) * 255, persistent=False)
        self.register_buffer("scale", 1 / (torch.tensor(STD).repeat_interleave(196) * 255), persistent=False)

    def forward(self, first: Tensor, second: Tensor | None, grid: Tensor) -> Tensor:
        """uint8 [b, n, 588] pairs of frames and grids [b, 2] to [b, n / 4, hidden]; past the grid: noise."""
        weight = self.patch_embed.proj.weight
        a, b = (weight[:, :, t].reshape(weight.shape[0], -1) for t in range(2))
        x = ((first.float() - self.mean) * self.scale).to(weight.dtype)
        if second is None:
            x = F.linear(x, a + b)
        else:
            x = F.linear(x, a) + F.linear(((second.float() - self.mean) * self.scale).to(weight.dtype), b)
        rows, cols = grid_positions(grid, x.shape[1])
        angle = torch.cat((rows[..., None] * self.inv_freq, cols[..., None] * self.inv_freq), -1)
        angle = torch.cat((angle, angle), -1)[:, None]
        cos, sin = angle.cos(), angle.sin()
        valid = torch.arange(x.shape[1]) < 4 * grid.prod(1, keepdim=True)
        bias = torch.where(valid, 0.0, -1e9)[:, None, None]
        for block in self.blocks:
            x = block(x, cos, sin, bias)
        return self.merger(x)


class Attention(nn.Module):
    """Grouped-query attention of a prefix and of slots that see the prefix and themselves."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        d, kv = c.head_dim, c.num_key_value_heads
        self.h, self.kv, self.d = c.num_attention_heads, kv, d
        self.q_proj = nn.Linear(c.hidden_size, self.h * d)
        self.k_proj = nn.Linear(c.hidden_size, kv * d)
        self.v_proj = nn.Linear(c.hidden_size, kv * d)
        self.o_proj = nn.Linear(self.h * d, c.hidden_size, bias=False)

    def _heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [..., kv, group, n, d]; k, v [..., kv, n, d]."""
        shape = x.shape[:-1]
        q = self.q_proj(x).view(*shape, self.kv, self.h // self.kv, self.d).movedim(-4, -2)
        k = self.k_proj(x).view(*shape, self.kv, self.d).movedim(-3, -2)
        v = self.v_proj(x).view(*shape, self.kv, self.d).movedim(-3, -2)
        return (
            rotate(q, cos.unsqueeze(-3).unsqueeze(-3), sin.unsqueeze(-3).unsqueeze(-3)),
            rotate(k, cos.unsqueeze(-3), sin.unsqueeze(-3)),
            v,
        )

    def _own(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and the attention of one head, which training may tell to compare two pictures."""
        b, kv, g, n, d = q.shape
        scores = (q.reshape(b, kv, g * n, d) @ k.transpose(-1, -2)).view(b, kv, g, n, n)
        weights = (scores.float() * d**-0.5 + mask[:, None, None]).softmax(-1).to(v.dtype)
        out = weights.view(b, kv, g * n, n) @ v
        return out.view(b, self.h, n, d).transpose(1, 2).reshape(b, n, self.h * d), weights[:, 0, 1]

    def forward(
        self, p: Tensor, s: Tensor, rope: tuple[Tensor, ...], masks: tuple[Tensor, ...], last: bool
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """Outputs for prefix and slots (the last prefix is unused), and the attention of one head of each."""
        b, np_, _ = p.shape
        _, t, n, _ = s.shape
        g, scale = self.h // self.kv, self.d**-0.5
        pq, pk, pv = self._heads(p, rope[0], rope[1])
        sq, sk, sv = self._heads(s, rope[2], rope[3])
        po, match = (None, None) if last else self._own(pq, pk, pv, masks[0])
        far = sq.permute(0, 2, 1, 3, 4, 5).reshape(b, self.kv, t * g * n, self.d) @ pk.transpose(-1, -2)
        far = far.view(b, self.kv, t, g, n, np_).transpose(1, 2)
        near = (sq.reshape(b, t, self.kv, g * n, self.d) @ sk.transpose(-1, -2)).view(b, t, self.kv, g, n, n)
        both = torch.cat(
            (
                far.float() * scale + masks[1][:, None, None, None],
                near.float() * scale + masks[2][:, :, None, None],
            ),
            -1,
        )
        weights = both.softmax(-1).to(sv.dtype)
        w_far = weights[..., :np_].transpose(1, 2).reshape(b, self.kv, t * g * n, np_)
        so = (w_far @ pv).view(b, self.kv, t, g, n, self.d).transpose(1, 2)
        so = so + (weights[..., np_:].reshape(b, t, self.kv, g * n, n) @ sv).view(b, t, self.kv, g, n, self.d)
        so = so.permute(0, 1, 4, 2, 3, 5).reshape(b, t, n, self.h * self.d)
        look = weights[:, :, 0, 0, :, :np_]  # one head, which training may tell where to look
        return None if po is None else self.o_proj(po), self.o_proj(so), look, match


class MLP(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn, self.mlp = Attention(c), MLP(c)

    def forward(
        self, p: Tensor, s: Tensor, rope: tuple[Tensor, ...], masks: tuple[Tensor, ...], last: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        dp, ds, look, match = self.self_attn(
            self.input_layernorm(p), self.input_layernorm(s), rope, masks, last
        )
        s = s + ds
        if dp is not None:
            p = p + dp
            p = p + self.mlp(self.post_attention_layernorm(p))
        return p, s + self.mlp(self.post_attention_layernorm(s)), look, match


class Text(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        half = c.head_dim // 2
        self.register_buffer(
            "inv_freq", c.rope_theta ** -(torch.arange(half).float() / half), persistent=False
        )
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(c.mrope_section))
        self.register_buffer("axis", axis, persistent=False)

    def rope(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """pos [3, ...] to cos and sin [..., head_dim]: frequency i turns with the axis that owns it."""
        angle = pos.movedim(0, -1)[..., self.axis].float() * self.inv_freq
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()


class Aux(nn.Module):
    """Dense heads, on the merger's output and on the second text layer; dropped at export."""

    def __init__(self, c: Config, kinds: int, colours: int, chars: int) -> None:
        super().__init__()
        d = c.hidden_size
        self.classes = (kinds, colours, chars)
        self.patch = nn.Linear(d, 4 * (kinds + colours + chars))
        self.box = nn.Linear(d, 4)
        self.norm = nn.LayerNorm(d)
        self.place = nn.Linear(d, 26)
        self.absolute = nn.Linear(d, 4)
        self.corners = nn.Linear(d, 4)
        self.size = nn.Linear(d, 26)
        self.centre = nn.Linear(d, 1)
        self.changed = nn.Linear(d, 1)


class Nano(nn.Module):
    def __init__(self, c: Config, kinds: int = 7, colours: int = 9, chars: int = 37) -> None:
        super().__init__()
        self.config, self.visual, self.model, self.aux = c, Vision(c), Text(c), Aux(c, kinds, colours, chars)

    def init_weights(self) -> None:
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                nn.init.normal_(p, std=0.02 if "embed_tokens" in name else p.shape[1:].numel() ** -0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight")):
                    p.data.mul_(0.2)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(
        self, x: dict[str, Tensor], seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
        """(slots' hidden states [b, s, n, d], merger output [f, t, d], prefix after two layers [b, p, d],
        the attention of a head of the middle layers from slots [b, s, n, p] and from the prefix [b, p, p]).
        """
        if seen is None:
            seen = self.visual(x["patches"], x.get("second"), x["grid"])
        table = torch.cat((seen.flatten(0, 1), seen.new_zeros(1, seen.shape[-1])))
        index = x["vision_index"]
        words = self.model.embed_tokens(x["prefix_ids"])
        p = torch.where((index >= 0)[..., None], table[index], words)
        s = self.model.embed_tokens(x["ids"])
        n_p, n_s = p.shape[1], s.shape[2]
        rope = (*self.model.rope(x["prefix_pos"]), *self.model.rope(x["pos"].expand(3, *x["pos"].shape)))
        order = torch.arange(n_p)
        mask_p = torch.where((order[:, None] >= order)[None] & x["prefix_valid"][:, None], 0.0, -1e9)
        mask_far = torch.where(x["prefix_valid"], 0.0, -1e9)[:, None].expand(-1, n_s, -1)
        order, segment = torch.arange(n_s), x["segment"]
        near = (order[:, None] >= order) & (segment[..., :, None] == segment[..., None, :])
        masks = (mask_p, mask_far, torch.where(near, 0.0, -1e9))
        middle, looks, matches = p, [], []
        for n, layer in enumerate(self.model.layers):
            p, s, look, match = layer(p, s, rope, masks, n + 1 == len(self.model.layers))
            looks.append(look)
            matches.append(match)
            if n == 1:
                middle = p
        return self.model.norm(s), seen, middle, looks[1:3], matches[1:3]
