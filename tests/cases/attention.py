"""nn.MultiheadAttention and the Transformer layers built on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tda_lightning.examples.models import Encoder
from tests.cases.case import Case, Function, normal, tokens


def _self(**options) -> nn.Module:
    mask = options.pop("mask", None)
    time_major = not options.get("batch_first", False)

    def forward(module: nn.Module, inputs: Tensor) -> Tensor:
        inputs = inputs.transpose(0, 1) if time_major else inputs
        own = None if mask is None else mask.to(inputs.device)
        out = module.attention(inputs, inputs, inputs, need_weights=False, attn_mask=own)[0]
        return (out.transpose(0, 1) if time_major else out).tanh()

    return Function(forward, attention=nn.MultiheadAttention(4, 2, **options))


def _cross(**options) -> nn.Module:
    """Queries are the first 2 positions' 4 features; keys and values the other 3 positions'."""
    time_major = not options.get("batch_first", False)
    kdim, vdim = options.get("kdim") or 4, options.get("vdim") or 4

    def forward(module: nn.Module, inputs: Tensor) -> Tensor:
        query, key, value = inputs[:, :2, :4], inputs[:, 2:, :kdim], inputs[:, 2:, -vdim:]
        triple = [query, key, value]
        if time_major:
            triple = [part.transpose(0, 1) for part in triple]
        out = module.attention(*triple)[0]
        return (out.transpose(0, 1) if time_major else out).tanh()

    return Function(forward, attention=nn.MultiheadAttention(4, 2, **options))


def _padded(module: nn.Module, inputs: Tensor) -> Tensor:
    """Masks the last position of the examples whose first feature there is positive."""
    mask = torch.zeros(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    mask[:, -1] = inputs[:, -1, 0] > 0
    return module.attention(inputs, inputs, inputs, key_padding_mask=mask)[0].tanh()


def _weights_used(module: nn.Module, inputs: Tensor) -> Tensor:
    out, weights = module.attention(inputs, inputs, inputs, average_attn_weights=False)
    return torch.cat([out.flatten(1), weights.flatten(1)], 1)


def _encoder(**options) -> nn.Module:
    time_major = not options.get("batch_first", False)
    mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)

    def forward(module: nn.Module, inputs: Tensor) -> Tensor:
        inputs = inputs.transpose(0, 1) if time_major else inputs
        out = module.encoder(inputs, mask=mask)
        return out.transpose(0, 1) if time_major else out

    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, **options)
    return Function(forward, encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def _decode(module: nn.Module, inputs: Tensor) -> Tensor:
    return module.decoder(inputs[:, :2], inputs[:, 2:])


def _language_model(module: nn.Module, numbers: Tensor) -> Tensor:
    """Positions come as arange: a layer whose input has no example axis."""
    time = numbers.shape[1]
    hidden = module.tokens(numbers) + module.positions(torch.arange(time, device=numbers.device))
    mask = nn.Transformer.generate_square_subsequent_mask(
        time, device=numbers.device, dtype=torch.float64
    )
    hidden = module.block(hidden, src_mask=mask, is_causal=True)
    return module.head(module.norm(hidden))


def _language_parts() -> nn.Module:
    embedding = nn.Embedding(6, 4)
    head = nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    return Function(
        _language_model,
        tokens=embedding,
        positions=nn.Embedding(4, 4),
        block=nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, norm_first=True),
        norm=nn.LayerNorm(4),
        head=head,
    )


def _fused_attention(module: nn.Module, inputs: Tensor) -> Tensor:
    """A GPT's own attention: one Linear for queries, keys and values, heads in an inner axis."""
    batch, time, width = inputs.shape
    parts = module.qkv(inputs).view(batch, time, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
    out = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
    return module.out(out.transpose(1, 2).reshape(batch, time, width))


def sentence_pairs(size: int) -> Tensor:
    """Words 3 to 6, one to three before the separator 2 and two after it, then padding 0."""
    pairs = torch.randint(3, 7, (size, 6))
    lengths = torch.randint(1, 4, (size, 1))
    places = torch.arange(6)
    return pairs.where(places != lengths, 2).where(places < lengths + 3, 0)


_CAUSAL = torch.ones(3, 3, dtype=torch.bool).triu(1)

ATTENTION = [
    Case("attention/self", _self, normal(3, 4), size=2),
    Case("attention/self_batch_first", lambda: _self(batch_first=True), normal(3, 4), size=2),
    Case("attention/self_causal", lambda: _self(batch_first=True, mask=_CAUSAL), normal(3, 4)),
    Case("attention/self_causal_time_major", lambda: _self(mask=_CAUSAL), normal(3, 4)),
    Case("attention/self_no_bias", lambda: _self(bias=False, batch_first=True), normal(3, 4)),
    Case("attention/cross", _cross, normal(5, 4)),
    Case("attention/cross_batch_first", lambda: _cross(batch_first=True), normal(5, 4), size=2),
    Case("attention/cross_widths", lambda: _cross(kdim=3, vdim=5), normal(5, 5)),
    Case(
        "attention/cross_widths_batch_first",
        lambda: _cross(kdim=3, vdim=5, batch_first=True),
        normal(5, 5),
    ),
    Case("attention/bias_kv", lambda: _cross(add_bias_kv=True), normal(5, 4)),
    Case(
        "attention/bias_kv_zero_attention",
        lambda: _self(add_bias_kv=True, add_zero_attn=True, batch_first=True),
        normal(3, 4),
    ),
    Case(
        "attention/padding_mask",
        lambda: Function(_padded, attention=nn.MultiheadAttention(4, 2, batch_first=True)),
        normal(3, 4),
        size=4,
    ),
    Case(
        "attention/weights_used",
        lambda: Function(_weights_used, attention=nn.MultiheadAttention(4, 2, batch_first=True)),
        normal(3, 4),
    ),
    Case(
        "attention/fused",
        lambda: Function(_fused_attention, qkv=nn.Linear(4, 12), out=nn.Linear(4, 4)),
        normal(3, 4),
    ),
    Case("transformer/encoder", _encoder, normal(3, 4), size=2),
    Case("transformer/encoder_batch_first", lambda: _encoder(batch_first=True), normal(3, 4)),
    Case(
        "transformer/encoder_norm_first",
        lambda: _encoder(batch_first=True, norm_first=True, activation="gelu"),
        normal(3, 4),
        size=2,
    ),
    Case(
        "transformer/encoder_norm_first_time_major", lambda: _encoder(norm_first=True), normal(3, 4)
    ),
    Case(
        "transformer/decoder",
        lambda: Function(_decode, decoder=nn.TransformerDecoderLayer(4, 2, 5, batch_first=True)),
        normal(5, 4),
    ),
    Case("transformer/language_model", _language_parts, tokens(6, 4), "classification", size=2),
    Case(
        "transformer/language_model_batch_is_time",
        _language_parts,
        tokens(6, 4),
        "classification",
        4,
    ),
    Case(
        "transformer/pair_encoder",
        lambda: Encoder(7, 6, outputs=2, width=4, depth=2, heads=2),
        sentence_pairs,
        "classification",
        size=6,
    ),
    Case("attention/self_batch_is_time", _self, normal(3, 4), size=3),
    Case("attention/self_batch_is_width", lambda: _self(batch_first=True), normal(4, 4), size=4),
]
