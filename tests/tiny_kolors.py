"""A tiny random Kolors pipeline, built offline in well under a second."""

import io
import string
import tempfile
from pathlib import Path

import sentencepiece
import torch
from diffusers import EulerDiscreteScheduler, KolorsPipeline
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from tiny_models import WORDS, build_tiny_unet, build_tiny_vae


VOCABULARY = 64  # of the sentencepiece model; nine special tokens follow


def build_tiny_kolors(folder, seed=0):
    """Saves a stock KolorsPipeline with random weights, for images of 64 pixels, into `folder`; returns its path."""
    noise = {"beta_start": 0.00085, "beta_end": 0.014, "beta_schedule": "scaled_linear", "num_train_timesteps": 1100}
    vae = build_tiny_vae(seed=seed, scaling_factor=0.13025)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = build_tiny_unet(
            vae.config.latent_channels,
            (8, 16),
            sample_size=8,
            cross_attention_dim=16,
            encoder_hid_dim=24,  # what ChatGLM returns, projected to what the attention layers take
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        )
        text_encoder = _chatglm(width=24)
    with tempfile.TemporaryDirectory() as scratch:  # saving the tokenizer copies its file
        pipeline = KolorsPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=_chatglm_tokenizer(Path(scratch)),
            unet=unet,
            scheduler=EulerDiscreteScheduler(**noise, steps_offset=1, timestep_spacing="leading"),
            force_zeros_for_empty_prompt=False,
        )
        pipeline.save_pretrained(folder)
    return Path(folder)


def _chatglm_tokenizer(folder):
    """ChatGLM's tokenizer, whose sentencepiece model (of single characters) is written into `folder`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*WORDS, *(" ".join(string.ascii_letters + ".,'-0123456789"),)]),
        model_writer=model,
        model_type="char",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return ChatGLMTokenizer(str(folder / "tokenizer.model"))


def _chatglm(width):
    """ChatGLM with random weights: its class leaves those of its norms uninitialised, and by default all."""
    sizes = {"num_layers": 2, "hidden_size": width, "ffn_hidden_size": 32, "kv_channels": 8, "num_attention_heads": 2}
    sizes |= {"padded_vocab_size": VOCABULARY + 16, "seq_length": 256, "add_qkv_bias": True}
    config = ChatGLMConfig(**sizes, multi_query_attention=True, multi_query_group_num=1, original_rope=True)
    model = ChatGLMModel(config, empty_init=False)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            torch.nn.init.ones_(parameter)
    return model.eval()
