"""Core attention against a softmax written out, with grouped queries and with a key-value cache."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

BATCH, WIDTH = 2, 8


def attend(query, key, value, scale=None):
    from stablemoe_ds.model.attention import SdpaAttention

    core = SdpaAttention(SimpleNamespace(attention_dropout=0.0), 1, softmax_scale=scale)
    return core(query, key, value, None)


def slow(query, key, value, scale):
    """[Sq, B, heads, d]: query s stands at position s + Sk - Sq and sees what is not later."""
    out = torch.zeros_like(query)
    offset = key.shape[0] - query.shape[0]
    per_group = query.shape[2] // key.shape[2]
    for s in range(query.shape[0]):
        for b in range(BATCH):
            for head in range(query.shape[2]):
                seen = range(s + offset + 1)
                scores = [float(query[s, b, head] @ key[j, b, head // per_group]) * scale for j in seen]
                total = sum(math.exp(x) for x in scores)
                for j in seen:
                    out[s, b, head] += math.exp(scores[j]) / total * value[j, b, head // per_group]
    return out.flatten(2)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 1), (1, 5), (3, 7)])
def test_attention_equals_a_softmax_written_out(queries, keys, heads, groups, scale):
    random = torch.Generator().manual_seed(queries * 10 + heads)
    query = torch.randn(queries, BATCH, heads, WIDTH, generator=random, dtype=torch.float64)
    key, value = (torch.randn(keys, BATCH, groups, WIDTH, generator=random, dtype=torch.float64) for _ in range(2))
    wanted = slow(query, key, value, scale or 1 / math.sqrt(WIDTH))
    torch.testing.assert_close(attend(query, key, value, scale), wanted)


def test_a_mask_is_refused():
    from stablemoe_ds.model.attention import SdpaAttention

    core = SdpaAttention(SimpleNamespace(attention_dropout=0.0), 1)
    x = torch.randn(3, BATCH, 2, WIDTH)
    with pytest.raises(TypeError, match="expected Documents for a mask, got Tensor"):
        core(x, x, x, torch.ones(3, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("device", "dtype", "masked", "whole"),
    [
        ("cuda", torch.bfloat16, False, False),
        ("cuda", torch.float16, False, False),
        ("cuda", torch.bfloat16, True, True),
        ("cuda", torch.float32, False, True),
        ("cpu", torch.float32, True, False),
    ],
)
def test_groups_are_spread_where_no_fast_kernel_takes_them(device, dtype, masked, whole):
    from stablemoe_ds.model.attention import wants_whole_heads

    assert wants_whole_heads(device, dtype, masked) is whole


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7)])
def test_spread_groups_are_the_same_attention(queries, keys, monkeypatch):
    monkeypatch.setattr("stablemoe_ds.model.attention.wants_whole_heads", lambda *_: True)
    random = torch.Generator().manual_seed(1)
    query = torch.randn(queries, BATCH, 6, WIDTH, generator=random, dtype=torch.float64)
    key, value = (torch.randn(keys, BATCH, 2, WIDTH, generator=random, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(attend(query, key, value), slow(query, key, value, 1 / math.sqrt(WIDTH)))


@pytest.mark.parametrize(
    ("device", "training", "plans"), [("cuda", False, False), ("cuda", True, True), ("cpu", False, True)]
)
def test_cudnn_is_left_out_where_lengths_change(device, training, plans):
    from stablemoe_ds.model.attention import kernels_for

    assert torch.backends.cuda.cudnn_sdp_enabled()
    with kernels_for(device, training):
        assert torch.backends.cuda.cudnn_sdp_enabled() is plans
        assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_rotary_angles_stay_fp32_and_move_with_the_model():
    from stablemoe_ds.model.parts import DeviceRotaryEmbedding

    rotary = DeviceRotaryEmbedding(WIDTH, 1.0, rotary_base=10_000, use_cpu_initialization=True)
    before = rotary(5)
    angles = torch.arange(5.0)[:, None] * 10_000 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    torch.testing.assert_close(before[:, 0, 0], torch.cat([angles, angles], -1))
    assert torch.equal(rotary.bfloat16()(5), before)
    assert rotary.to("meta")(5).device.type == "meta", "angles of an earlier call must not be kept"
    assert not rotary.state_dict()
