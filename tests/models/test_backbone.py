"""Backbones of many kinds, made on the spot: the whole road from texts to rewards, and what is refused at once."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from openrlhf_pgrpo.models import backbone as backbones
from openrlhf_pgrpo.models.folder import Folder, write
from openrlhf_pgrpo.models.scoring import embed, load

pytestmark = pytest.mark.core

SMALL = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
DECODER = dict(SMALL, num_key_value_heads=1, head_dim=16, max_position_embeddings=128, pad_token_id=0, eos_token_id=1)
ENCODER = dict(SMALL, max_position_embeddings=66, pad_token_id=1)
IMAGES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28)
IMAGES |= dict(patch_size=14)
GEMMA = dict(text_config=DECODER, vision_config=IMAGES, image_token_index=399, mm_tokens_per_image=4)
LLAVA = dict(text_config=dict(DECODER, model_type="llama"), image_token_index=399)
LLAVA |= dict(vision_config=dict(IMAGES, model_type="clip_vision_model"))
PROMPTS, RESPONSES = ["once upon ", "a", ""], ["a time", "b" * 20, "ran"]


@pytest.fixture
def folder_of(tiny, tmp_path):
    """A folder with a model of this class and config, all weights random, and the byte-level tokenizer."""

    def folder_of(model, config, **options):
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**options))
        folder = tmp_path / model
        made.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(folder)
        return folder

    return folder_of


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(
    "model, config, options, longest",
    [
        ("Gemma3ForConditionalGeneration", "Gemma3Config", GEMMA, 128),
        ("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER, 128),
        ("LlavaForConditionalGeneration", "LlavaConfig", LLAVA, 128),
        ("GPT2LMHeadModel", "GPT2Config", dict(vocab_size=400, n_embd=32, n_layer=1, n_head=2, n_positions=64), 64),
        ("RobertaForMaskedLM", "RobertaConfig", ENCODER, 64),
        ("AlbertForMaskedLM", "AlbertConfig", dict(ENCODER, embedding_size=16), 66),
        ("ModernBertForMaskedLM", "ModernBertConfig", dict(ENCODER, reference_compile=False), 66),
        ("EsmForMaskedLM", "EsmConfig", dict(ENCODER, mask_token_id=5), 64),
    ],
)
def test_d11_a15_any_backbone_gives_the_rewards_that_were_fitted_and_one_fingerprint(
    folder_of, tmp_path, model, config, options, longest, pooling
):
    """The hidden size and the positions are those of the part for text. A pooler that the checkpoint lacks, as of
    masked language models do, is random in each process: it is left out."""
    backbone = folder_of(model, config, **options)
    states = embed(backbone, PROMPTS, RESPONSES, pooling)
    for name in ("one", "two"):
        write(tmp_path / name, backbone, np.eye(2, 32), np.eye(2), ["u", "v"], pooling)
    made = load(tmp_path / "one")
    assert np.abs(made.base_rewards(PROMPTS, RESPONSES) - states[:, :2]).max() < 1e-4
    assert Folder(tmp_path / "two").fingerprint == made.fingerprint and made.max_length == longest
    assert not [name for name in load_file(tmp_path / "one" / "model.safetensors") if "pooler" in name]


@pytest.mark.parametrize(
    "model, config, options, message",
    [
        ("T5Model", "T5Config", dict(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16), "of encoder and decod"),
        ("ViTModel", "ViTConfig", IMAGES, "a vit in .*config.json, which reads no texts"),
        ("CLIPModel", "CLIPConfig", dict(text_config=SMALL, vision_config=IMAGES), "or none without images"),
    ],
)
def test_d11_what_can_be_no_backbone_is_refused_at_once(folder_of, tmp_path, model, config, options, message):
    backbone = folder_of(model, config, **options)
    for weights in backbone.glob("*.safetensors"):
        weights.unlink()  # nothing is loaded before
    for read in (
        lambda: embed(backbone, PROMPTS, RESPONSES),
        lambda: write(tmp_path / "made", backbone, np.ones((1, 32)), np.ones((1, 1)), ["u"]),
    ):
        with pytest.raises(ValueError, match=message):
            read()


def test_d11_a_config_without_hidden_size_is_refused_by_name(folder_of, monkeypatch):
    config = backbones.read_config(folder_of("LlamaForCausalLM", "LlamaConfig", **DECODER))
    monkeypatch.setattr(type(config), "get_text_config", lambda self: transformers.PretrainedConfig())
    with pytest.raises(ValueError, match="got a llama in that/config.json, with hidden_size None: name another"):
        backbones.check(config, "that")


@pytest.mark.parametrize("lost", ["encoder.layer.1.output.dense.weight", "embeddings.word_embeddings.weight"])
def test_a15_a_weight_that_a_state_depends_on_is_not_drawn_at_random(folder_of, tmp_path, lost):
    backbone = folder_of("RobertaForMaskedLM", "RobertaConfig", **ENCODER)
    weights = load_file(backbone / "model.safetensors")
    del weights[f"roberta.{lost}"]
    save_file(weights, backbone / "model.safetensors", {"format": "pt"})
    for read in (
        lambda: embed(backbone, PROMPTS, RESPONSES),
        lambda: write(tmp_path / "made", backbone, np.ones((1, 32)), np.ones((1, 1)), ["u"]),
    ):
        with pytest.raises(ValueError, match=f"RobertaForMaskedLM needs all weights, got none for '{lost}', which wo"):
            read()


def test_a15_an_older_folder_with_a_random_pooler_is_still_read(folder_of, tmp_path):
    backbone = folder_of("RobertaForMaskedLM", "RobertaConfig", **ENCODER)
    write(tmp_path / "made", backbone, np.eye(2, 32), np.eye(2), ["u", "v"], "mean")
    expected = load(tmp_path / "made").base_rewards(PROMPTS, RESPONSES)
    weights = load_file(tmp_path / "made" / "model.safetensors")
    weights |= {"roberta.pooler.dense.weight": torch.ones(32, 32), "roberta.pooler.dense.bias": torch.ones(32)}
    save_file(weights, tmp_path / "made" / "model.safetensors", {"format": "pt"})
    np.testing.assert_array_equal(load(tmp_path / "made").base_rewards(PROMPTS, RESPONSES), expected)


@pytest.mark.parametrize("read", [backbones.read_config, backbones.read_tokenizer])
def test_a_mistyped_folder_is_said_to_be_none(read, tmp_path):
    """It was said to be a bad name on the hub, which needs alphanumeric characters."""
    for name in ("./rm_nois", "~/rm", tmp_path / "rm_nois", "runs/1/rm"):
        with pytest.raises(
            ValueError, match=f"a model needs to be a folder or a name on the hub, got {name}, which is"
        ):
            read(name)
