"""A dense eager model against transformers' LlavaForConditionalGeneration with the same random weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID, ModelConfig, PromptConfig
from dpn_rt.model.config import DecoderConfig, RopeConfig
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.model.vision.clip.config import Activation, ClipConfig, SelectFeature
from dpn_rt.model.vision.projector import ProjectorConfig
from dpn_rt.reference import EagerDpn
from dpn_rt.reference.hf_modules import clip_core

IMAGE_TOKEN = 99


def model_config(
    *, tied: bool, bias: bool, activation: Activation, feature: SelectFeature, scaling: str = ""
) -> ModelConfig:
    return ModelConfig(
        dtype="float32",
        decoder=DecoderConfig(
            vocab_size=100,
            hidden_size=48,
            intermediate_size=80,
            num_layers=3,
            num_heads=6,
            num_kv_heads=2,
            head_dim=8,
            rms_norm_eps=1e-5,
            rope=RopeConfig(5000.0, scaling),
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            qkv_bias=bias,
            o_bias=bias,
        ),
        reduction=NoReduction(),
        prompt=PromptConfig("tokenizer", "processor", 1, (2,), IMAGE_TOKEN, None, False, False),
        vision=ClipConfig(32, 64, 3, 4, 28, 7, 1e-5, activation, feature),
        projector=ProjectorConfig("mlp2x_gelu", 32),
    )


def llava(config: ModelConfig) -> LlavaForConditionalGeneration:
    """transformers' model of `config` with random weights, norms included; its tower has an unused last layer."""
    decoder, vision = config.decoder, config.vision
    assert vision is not None
    text = LlamaConfig(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=decoder.num_layers,
        num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        rms_norm_eps=decoder.rms_norm_eps,
        rope_theta=decoder.rope.theta,
        rope_scaling={"rope_type": "linear", "factor": 2.0} if decoder.rope.scaling_json else None,
        max_position_embeddings=decoder.max_position_embeddings,
        attention_bias=decoder.qkv_bias,
        tie_word_embeddings=decoder.tie_word_embeddings,
    )
    clip = CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_layers + 1,
        num_attention_heads=vision.num_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act=vision.activation,
    )
    strategy = "default" if vision.select_feature == "patch" else "full"
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=clip,
            text_config=text,
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-2,
            vision_feature_select_strategy=strategy,
            tie_word_embeddings=decoder.tie_word_embeddings,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def copy_of(model: LlavaForConditionalGeneration, config: ModelConfig) -> EagerDpn:
    eager = EagerDpn(config).eval()
    assert eager.vision is not None and eager.projector is not None
    eager.language_model.load_state_dict(model.model.language_model.state_dict())
    if not config.decoder.tie_word_embeddings:
        eager.lm_head.load_state_dict(model.lm_head.state_dict())
    target = clip_core(eager.vision)
    known = target.state_dict().keys()
    source = clip_core(model.model.vision_tower).state_dict()
    target.load_state_dict({name: tensor for name, tensor in source.items() if name in known})
    eager.projector[0].load_state_dict(model.model.multi_modal_projector.linear_1.state_dict())
    eager.projector[2].load_state_dict(model.model.multi_modal_projector.linear_2.state_dict())
    return eager


CONFIGS = {
    "untied": model_config(tied=False, bias=False, activation="quick_gelu", feature="patch"),
    "tied-bias-gelu-cls": model_config(tied=True, bias=True, activation="gelu", feature="cls_patch"),
    "linear-rope": model_config(
        tied=False, bias=False, activation="quick_gelu", feature="patch", scaling='{"rope_type": "linear", "factor": 2}'
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name: str) -> None:
    config = CONFIGS[name]
    assert config.vision is not None
    reference = llava(config)
    eager = copy_of(reference, config)
    pixels = torch.randn(1, 3, 28, 28)
    before, after = [1, 17, 30], torch.randint(3, 99, (9,)).tolist()
    visual = [IMAGE_TOKEN] * config.vision.num_visual_tokens
    with torch.inference_mode():
        ids = torch.tensor([[*before, *visual, *after]])
        expected = reference(input_ids=ids, pixel_values=pixels).logits[0]
        output = eager([*before, IMAGE_PLACEHOLDER_ID, *after], pixels)
        text = eager(after).logits
        expected_text = reference(input_ids=torch.tensor([after])).logits[0]
        ours = eager.generate([*before, IMAGE_PLACEHOLDER_ID, *after], pixels, max_new_tokens=5)
        # A generated placeholder of an image is a token for us; transformers would look for the image.
        chosen = torch.tensor([[*itertools.takewhile(lambda token: token != IMAGE_TOKEN, ours.token_ids)]]).long()
        rows = reference(input_ids=torch.cat([ids, chosen], 1), pixel_values=pixels).logits[0, ids.shape[1] - 1 : -1]
    assert expected.std() > 0.3
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(text, expected_text, atol=1e-4, rtol=0)
    # The most probable tokens, or as probable ones within the error above of both.
    assert (rows.amax(1) - rows.gather(1, chosen.T)[:, 0] < 2e-4).all()
    assert len(ours.token_ids) == 5 or ours.token_ids[-1] in config.prompt.eos_token_ids
    assert output.trace.visual_tokens == (len(visual),)
    assert ours.kv_lengths == (ids.shape[1] + len(ours.token_ids) - 1,) * 3


def test_a_random_model_trains_from_scratch_with_its_tower() -> None:
    config = CONFIGS["untied"]
    model = EagerDpn(config).train()
    ids = torch.tensor([1, IMAGE_PLACEHOLDER_ID, 5, 6, 7])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    pixels = torch.randn(3, 28, 28)
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(ids, pixels, labels=ids.clamp(min=-100)).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert model.vision is not None
    assert clip_core(model.vision).embeddings.patch_embedding.weight.grad is not None
