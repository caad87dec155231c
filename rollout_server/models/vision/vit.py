"""Vision transformers with a square of learned positions, as CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343) have
them: their layers, and patches cut out of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rollout_server.models.encoders.activations import ACTIVATIONS
from rollout_server.models.encoders.attention import attend_in_parts, split_heads


def cut(pixels: mx.array, size: int) -> mx.array:
    """[B, channels, rows, columns] → [B, patches, channels · size · size], row by row; what is left over at the right
    and below is not seen, as by a convolution."""
    batch, channels, rows, columns = pixels.shape
    down, across = rows // size, columns // size
    whole = pixels[:, :, : down * size, : across * size].reshape(batch, channels, down, size, across, size)
    return whole.transpose(0, 2, 4, 1, 3, 5).reshape(batch, down * across, channels * size * size)


class Patches(nn.Linear):
    """A convolution whose steps are as wide as its kernel: a product over each patch."""

    def __init__(self, fields: Mapping[str, Any], *, bias: bool) -> None:
        size = fields["patch_size"]
        super().__init__(fields["num_channels"] * size**2, fields["hidden_size"], bias=bias)
        self._size = size

    def __call__(self, pixels: mx.array) -> mx.array:
        return super().__call__(cut(pixels.astype(self.weight.dtype), self._size))


class Attention(nn.Module):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        width, self._heads = fields["hidden_size"], fields["num_attention_heads"]
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def __call__(self, x: mx.array) -> mx.array:
        q, k, v = (split_heads(layer(x), self._heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend_in_parts(q, k, v))


class Feed(nn.Module):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self._activation = ACTIVATIONS[fields["hidden_act"]]
        self.fc1 = nn.Linear(fields["hidden_size"], fields["intermediate_size"])
        self.fc2 = nn.Linear(fields["intermediate_size"], fields["hidden_size"])

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self._activation(self.fc1(x)))


class Layer(nn.Module):
    """Norms stand before both halves."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self.self_attn = Attention(fields)
        self.mlp = Feed(fields)
        self.layer_norm1, self.layer_norm2 = (norm(fields) for _ in range(2))

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Layers(nn.Module):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self.layers = [Layer(fields) for _ in range(fields["num_hidden_layers"])]

    def states(self, x: mx.array) -> Iterator[mx.array]:
        """What goes in, and what each layer gives, one behind the other."""
        yield x
        for layer in self.layers:
            x = layer(x)
            yield x


def norm(fields: Mapping[str, Any]) -> nn.LayerNorm:
    return nn.LayerNorm(fields["hidden_size"], eps=fields["layer_norm_eps"])


def side(fields: Mapping[str, Any]) -> int:
    """Patches along one side of the square for which positions were learned."""
    count: int = fields["image_size"] // fields["patch_size"]
    return count


class SiglipEmbeddings(nn.Module):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self.patch_embedding = Patches(fields, bias=True)
        self.position_embedding = nn.Embedding(side(fields) ** 2, fields["hidden_size"])

    def __call__(self, pixels: mx.array) -> mx.array:
        """[B, channels, rows, columns] → [B, patches, hidden]."""
        return self.patch_embedding(pixels) + self.position_embedding.weight


class SiglipTower(nn.Module):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self.embeddings = SiglipEmbeddings(fields)
        self.encoder = Layers(fields)
        self.post_layernorm = norm(fields)

    def __call__(self, pixels: mx.array) -> mx.array:
        *_, last = self.encoder.states(self.embeddings(pixels))
        return self.post_layernorm(last)


class ClipEmbeddings(nn.Module):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self.class_embedding = mx.zeros(fields["hidden_size"])
        self.patch_embedding = Patches(fields, bias=False)
        self.position_embedding = nn.Embedding(side(fields) ** 2 + 1, fields["hidden_size"])

    def __call__(self, pixels: mx.array) -> mx.array:
        patches = self.patch_embedding(pixels)
        first = mx.broadcast_to(self.class_embedding, (len(patches), 1, patches.shape[-1]))
        return mx.concatenate([first, patches], axis=1) + self.position_embedding.weight


class ClipTower(nn.Module):
    """Hidden states are read below its last norm, so that it has none."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(fields)
        self.pre_layrnorm = norm(fields)
        self.encoder = Layers(fields)

    def states(self, pixels: mx.array) -> list[mx.array]:
        """Hidden states [B, 1 + patches, hidden], before the first layer and behind each."""
        return list(self.encoder.states(self.pre_layrnorm(self.embeddings(pixels))))
