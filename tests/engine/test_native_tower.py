"""The vision tower's attention in C++ on a CPU: against transformers' own, and its trial."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from llava_serve.engine.executor import native_tower
from llava_serve.engine.executor.kernels import native_build, native_prefill
from llava_serve.engine.executor.native_tower import IMPLEMENTATION, use_native_tower

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 42, "patch_size": 14}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-2}

pytestmark = pytest.mark.skipif(native_build.compiler() is None, reason="there is no C++ compiler")


def model_of(kind: str, dtype: torch.dtype, hidden: int = 32) -> Any:
    """A tower as the engine sees it."""
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": hidden, "intermediate_size": 2 * hidden}
    tower: Any = {
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**sizes)),
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False)),
    }[kind]()
    tower = tower.to(dtype).eval()

    def tower_features(tiles: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            features: torch.Tensor = tower(tiles.permute(0, 3, 1, 2).to(dtype) / 255).last_hidden_state
        return features

    spec = SimpleNamespace(image=SimpleNamespace(crop_size=(42, 42)))
    return SimpleNamespace(vision_tower=tower, tower_features=tower_features, dtype=dtype, spec=spec,
                           device=torch.device("cpu"))  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_features_are_those_of_transformers(kind: str, dtype: torch.dtype) -> None:
    model = model_of(kind, dtype)
    tiles = torch.randint(0, 256, (3, 42, 42, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = model.tower_features(tiles).float()
    use_native_tower(model)
    assert model.vision_tower.config._attn_implementation == IMPLEMENTATION
    difference = (model.tower_features(tiles).float() - expected).norm() / expected.norm()
    assert difference <= TOLERANCES[dtype]


@pytest.mark.parametrize(("hidden", "dtype"), [(36, torch.float32), (32, torch.float64)])
def test_other_widths_and_precisions_are_left_alone(hidden: int, dtype: torch.dtype) -> None:
    model = model_of("clip", dtype, hidden)
    use_native_tower(model)
    assert model.vision_tower.config._attn_implementation == "sdpa"


def test_a_trial_finds_other_features(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As of a tower whose attention gets what this one ignores."""

    def wrong(query: torch.Tensor, *others: Any) -> torch.Tensor:
        return right(2 * query, *others)

    right = native_prefill.prefill_attention
    monkeypatch.setattr(f"{native_tower.__name__}.prefill_attention", wrong)
    model = model_of("clip", torch.float32, 64)
    for parameter in model.vision_tower.parameters():  # so that attention is not even
        parameter.data *= 8
    with caplog.at_level(logging.WARNING):
        use_native_tower(model)
    assert model.vision_tower.config._attn_implementation == "sdpa"
    assert "its features differ" in caplog.text


def test_a_masked_tower_keeps_its_mask() -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    module = torch.nn.Module()
    found, _ = native_tower.attend(module, query, key, value, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(found, expected)
