"""train_lpl_dit.py: bad input is one sentence with the remedy; the flags of the scripts that users come from work."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import named_flags
from test_arguments import ALL_FLAGS, DIFFUSERS, edit_config, lands, words_with
from tiny_models import build_tiny_vae
from tiny_transformers import build_tiny_pipeline

import arguments
import model_checks
import train_lpl_dit
import train_lpl_sd
from model_families import find_family


ROOT = Path(arguments.__file__).parent
CONFIGS = ROOT / "transformer_configs"
LATER = ("Chroma", "Flux2Klein", "QwenImage", "ZImage", "Lumina2", "AuraFlow", "HunyuanDiT")
SHIFTED = ("Chroma", "ZImage", "Lumina2")  # of these, families whose VAE has a shift
PACKED = ("Chroma", "Flux2Klein", "QwenImage")  # whose transformers have a channel for each of 2 x 2 latents
BNB = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def flags_of(script):
    """Every flag of a script, its --help left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "parse_and_check", lambda parser, argv: parser)
        return set(script.parse_args()._option_string_actions) - {"-h", "--help"}


def flags_defaults(script):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "parse_and_check", lambda parser, argv: parser)
        return script.parse_args()._defaults


@pytest.fixture(scope="session")
def known_flags():
    return flags_of(train_lpl_dit)


@pytest.fixture(scope="session")
def sd3(tmp_path_factory):
    """A tiny Stable Diffusion 3 with positions for 1024 pixels."""
    folder = tmp_path_factory.mktemp("sd3") / "sd3"
    return build_tiny_pipeline(folder, "StableDiffusion3", pos_embed_max_size=64)


@pytest.fixture
def parse(tiny_pipeline, photos, class_folders, tmp_path):
    """Parses flags after those for a tiny model (a family, a folder or None) and data that fit it; the last wins."""

    def run(*words, model="StableDiffusion3", data=None, resolution=64, script=train_lpl_dit):
        data = data or (class_folders if model in ("DiT", None) else photos)
        flags = ["--train_data_dir", data, "--output_dir", tmp_path / "out", "--report_to", "none"]
        flags += ["--resolution", resolution] if resolution else []
        if model is not None:
            flags += ["--pretrained_model_name_or_path", tiny_pipeline(model) if isinstance(model, str) else model]
        return script.parse_args([str(word) for word in (*flags, *words)])

    return run


@pytest.fixture
def scratch(refuse, tiny_pipeline):
    """What `refuse` says of the flags for a new transformer on class labels, with Stable Diffusion's kind of VAE."""

    def run(*words, config=CONFIGS / "dit-tiny.json", vae=None, **settings):
        flags = ["--transformer_config", config, "--pretrained_vae_model_name_or_path", vae or tiny_pipeline("DiT")]
        return refuse(*flags, *words, model=None, **settings)

    return run


@pytest.fixture
def write(tmp_path):
    """Writes a json file and returns its path: changes to one of transformer_configs, or the words themselves."""

    def run(content, base=None):
        path = tmp_path / "written.json"
        if base is not None:
            content = {**json.loads((CONFIGS / f"{base}.json").read_text()), **content}
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return run


def channels_of(model):
    """Latent channels of a model's VAE, by its config."""
    config = json.loads((model / "vae" / "config.json").read_text())
    return config.get("z_dim") or config["latent_channels"]


def vae_of(family, folder, **config):
    """Saves another VAE, of the kind that belongs to one of LATER, and returns its folder."""
    kinds = {"Flux2Klein": "AutoencoderKLFlux2", "QwenImage": "AutoencoderKLQwenImage"}
    shift = {"shift_factor": 0.1} if family in SHIFTED else {}
    build_tiny_vae(kinds.get(family, "AutoencoderKL"), **shift, **config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "model, words, sentence",
    [
        ("DiT", "--caption_column text", "--caption_column has no effect with the class labels of DiTPipeline"),
        ("DiT", "--cache_text_embeddings", "--cache_text_embeddings has no effect with the class labels of DiTPipel"),
        ("DiT", "--max_sequence_length 77", "--max_sequence_length has no effect with DiTPipeline"),
        ("DiT", "--weighting_scheme none", "--weighting_scheme has no effect with epsilon prediction, which is no"),
        ("DiT", "--guidance_scale 2", "--guidance_scale has no effect with DiTPipeline, which is not told of its"),
        ("DiT", "--prediction_type flow_prediction", "the model was trained with epsilon, and flow matching can't be"),
        ("DiT", "--rescale_betas_zero_snr", "add --prediction_type v_prediction"),
        ("DiT", "--resolution 72", "--resolution 72 must be a multiple of 16, the VAE's factor times the"),
        ("PixArtAlpha", "--logit_mean 1", "--logit_mean has no effect with epsilon prediction"),
        ("PixArtSigma", "--guidance_scale 2", "--guidance_scale has no effect with PixArtSigmaPipeline"),
        ("StableDiffusion3", "--label_column label", "--label_column has no effect with the captions of Stable"),
        ("StableDiffusion3", "--prediction_type epsilon", "the model was trained with flow_prediction, and flow"),
        ("StableDiffusion3", "--rescale_betas_zero_snr", "--rescale_betas_zero_snr has no effect with flow matching"),
        (
            "Sana",
            "--timestep_bias_strategy later --timestep_bias_multiplier 2",
            "--timestep_bias_strategy has no effect with flow matching",
        ),
        ("StableDiffusion3", "--mode_scale 1", "--mode_scale has no effect with --weighting_scheme logit_normal"),
        ("Flux", "--logit_mean 0.5", "--logit_mean has no effect with --weighting_scheme none"),
        ("Flux", "--logit_std 0", "--logit_std 0.0 must be greater than 0"),
        ("Flux", "--weighting_scheme mode --mode_scale 1.8", "--mode_scale 1.8 must be from -1 to 1.75"),
        ("Flux", "--weighting_scheme mode --mode_scale -1.1", "--mode_scale -1.1 must be from -1 to 1.75"),
        (
            "StableDiffusion3",
            "--weighting_scheme sigma_sqrt --snr_gamma 5",
            "--snr_gamma has no effect with --weighting_scheme sigma_sqrt",
        ),
        (
            "StableDiffusion3",
            "--resolution 208",
            "--resolution 208: the transformer has positions for 192 pixels (pos_embed_max_size), give that or less",
        ),
        *(
            (
                "StableDiffusion3",
                f"--weighting_scheme {scheme} --l2_weight 0 --lpl_weight 1",
                "--weighting_scheme has no effect with --l2_weight 0: leave one of them out",
            )
            for scheme in ("sigma_sqrt", "cosmap")
        ),
        ("Flux", "--max_sequence_length 513", "--max_sequence_length 513: FluxPipeline draws with at most 512"),
        ("Flux", "--max_sequence_length 0", "--max_sequence_length 0 must be at least 1"),
        ("Flux", "--train_text_encoder", "--train_text_encoder is not there for transformers"),
        *(
            (model, "--guidance_scale 2", f"--guidance_scale has no effect with {model}Pipeline, which is not told of")
            for model in LATER
        ),
        ("HunyuanDiT", "--gradient_checkpointing", "--gradient_checkpointing has no effect with HunyuanDiTPipeline"),
        ("HunyuanDiT", "--max_sequence_length 77", "--max_sequence_length has no effect with HunyuanDiTPipeline, who"),
        ("QwenImage", "--max_sequence_length 1025", "1025: QwenImagePipeline draws with at most 1024, give that or"),
        ("ZImage", "--max_sequence_length 993", "--max_sequence_length 993: ZImagePipeline draws with at most 992"),
        ("Lumina2", "--max_sequence_length 300", "--max_sequence_length 300: Lumina2Pipeline draws with at most 299"),
        (
            "AuraFlow",  # 144 positions: 12 in each direction
            "--resolution 208",
            "--resolution 208: the transformer has positions for 192 pixels (pos_embed_max_size), give that or less",
        ),
        ("HunyuanDiT", "--logit_mean 1", "--logit_mean has no effect with v_prediction"),
        ("HunyuanDiT", "--prediction_type flow_prediction", "the model was trained with v_prediction, and flow match"),
        ("Flux2Klein", "--prediction_type v_prediction", "the model was trained with flow_prediction, and flow"),
        ("Lumina2", "--rescale_betas_zero_snr", "--rescale_betas_zero_snr has no effect with flow matching"),
        ("QwenImage", "--lpl_num_blocks 5", "--lpl_num_blocks 5: the VAE's decoder has 4 up blocks, give that or few"),
        ("Flux2Klein", "--lpl_num_blocks 5", "--lpl_num_blocks 5: the VAE's decoder has 4 up blocks, give that or fe"),
        *(
            (model, "--use_lora --output_kohya_format", f"and FLUX.1, not for {model}Pipeline: leave it out")
            for model in ("StableDiffusion3", "DiT", "PixArtSigma", *LATER)
        ),
        ("Flux", "--use_lora --use_dora --output_kohya_format", "the magnitudes of --use_dora as they are meant"),
    ],
)
def test_flags_that_do_not_fit_the_model(refuse, model, words, sentence):
    message = refuse(*words.split(), model=model)
    assert sentence in message and message.endswith((".\n", "?\n"))


@pytest.mark.parametrize("model", ["Flux", "Flux2Klein"])
def test_the_guidance_of_transformers_that_are_not_told_of_it(parse, refuse, tiny_pipeline, tmp_path, model):
    # FLUX.1-dev's config says that it is told, schnell's that it is not; of FLUX.2 klein the pipeline tells nothing.
    told = model == "Flux"
    other = edit_config(tiny_pipeline(model), tmp_path, "transformer/config.json", guidance_embeds=not told)
    if told:
        assert parse("--guidance_scale", 2, model=tiny_pipeline(model)).guidance_scale == 2
    assert f"--guidance_scale has no effect with {model}Pipeline" in refuse("--guidance_scale", 2, model=other)


@pytest.mark.parametrize(
    "model, longest", [("QwenImage", 1024), ("ZImage", 992), ("Lumina2", 299), ("AuraFlow", 4096)]
)
def test_the_longest_captions(parse, model, longest):
    assert parse("--max_sequence_length", longest, model=model).max_sequence_length == longest


def test_auraflow_counts_positions_of_both_directions(parse, refuse, tiny_pipeline, tmp_path):
    assert parse(model="AuraFlow", resolution=192).latent_size == 24
    model = edit_config(tiny_pipeline("AuraFlow"), tmp_path, "transformer/config.json", pos_embed_max_size=5**2)
    assert parse(model=model, resolution=80).latent_size == 10
    assert "--resolution 96: the transformer has positions for 80 pixels" in refuse(model=model, resolution=96)


@pytest.mark.parametrize("model", ["DiT", "StableDiffusion3", "PixArtAlpha", "PixArtSigma", "Sana", "Flux", *LATER])
def test_what_fits_is_accepted(parse, model):
    args = parse("--offload", model=model)
    assert args.offload and args.latent_size == 8


def test_patches_and_packing_take_twice_the_factor_of_the_vae(parse, refuse):
    assert parse(model="Sana", resolution=72).latent_size == 9  # neither
    for model in ("Flux", "PixArtAlpha", "StableDiffusion3", *LATER):
        assert "--resolution 72 must be a multiple of 16, the VAE's factor times" in refuse(model=model, resolution=72)


# Models


def test_every_pipeline_has_its_rules():
    known = flags_defaults(train_lpl_dit)["pipelines"]
    assert {*known, *flags_defaults(train_lpl_sd)["pipelines"]} == set(model_checks.PIPELINES)
    assert set(known) - {"ClassConditionalPipeline"} == {
        f"{model}Pipeline"
        for model in ("DiT", "StableDiffusion3", "PixArtAlpha", "PixArtSigma", "Sana", "Flux", *LATER)
    }


def test_pipelines_of_other_kinds(parse, refuse, tiny_pipeline, tiny_sd, tmp_path, capsys):
    other = edit_config(tiny_pipeline("Flux"), tmp_path, "model_index.json", _class_name="Flux2Pipeline")
    message = refuse(model=other)
    assert "is a Flux2Pipeline; this script finetunes DiTPipeline, StableDiffusion3Pipeline, PixArtAlpha" in message
    assert "train_lpl_sd.py" not in message
    message = refuse(model=tiny_sd)
    assert "is a StableDiffusionPipeline; " in message and "for those with a unet there is train_lpl_sd.py." in message
    with pytest.raises(SystemExit):
        parse(model="Flux", script=train_lpl_sd)
    assert "for those with a transformer there is train_lpl_dit.py." in capsys.readouterr().err


def test_vaes_of_other_kinds(refuse, tiny_pipeline, tmp_path):
    other = edit_config(tiny_pipeline("Flux"), tmp_path, "vae/config.json", _class_name="AutoencoderKLWan")
    message = refuse(model=other)
    assert "the VAE is a AutoencoderKLWan, this script supports AutoencoderKL, Asymmetric" in message
    assert "--pretrained_vae_model_name_or_path" in message


@pytest.mark.parametrize("model", ["DiT", "PixArtAlpha", "PixArtSigma", "Sana", "AuraFlow", "HunyuanDiT"])
def test_a_shift_that_the_pipeline_would_forget(refuse, tiny_pipeline, tmp_path, model):
    other = edit_config(tiny_pipeline(model), tmp_path, "vae/config.json", shift_factor=0.1)
    assert f"the VAE has a shift_factor, which {model}Pipeline does not undo" in refuse(model=other)


@pytest.mark.parametrize(
    "model, file, changes, sentence",
    [
        (
            "AuraFlow",
            "scheduler/scheduler_config.json",
            {"use_dynamic_shifting": True},
            "is a FlowMatchEulerDiscreteScheduler with use_dynamic_shifting, with which AuraFlowPipeline can't sample",
        ),
        (
            "HunyuanDiT",
            "scheduler/scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "is a FlowMatchEulerDiscreteScheduler, with which HunyuanDiTPipeline can't sample: give a model with its",
        ),
        ("QwenImage", "transformer/config.json", {"guidance_embeds": True}, "has guidance_embeds, which is not there"),
        (
            "QwenImage",
            "vae/config.json",
            {"latents_mean": None},
            "latents_mean must be 4 numbers, one for each channel",
        ),
        ("QwenImage", "vae/config.json", {"latents_std": [1, 1, 0, 1]}, "latents_std must be 4 numbers above 0, one"),
        ("QwenImage", "vae/config.json", {"temperal_downsample": [True]}, "temperal_downsample must have 3 values"),
        (
            "Lumina2",
            "transformer/config.json",
            {"axes_lens": [64, 512, 512]},
            "256 (the default): Lumina2Pipeline draws",
        ),
        (
            "ZImage",
            "transformer/config.json",
            {"axes_lens": [64, 9, 9]},
            "512 (the default): ZImagePipeline draws with",
        ),
        ("Lumina2", "transformer/config.json", {"axes_lens": [300, 4, 3]}, "has positions for 48 pixels (axes_lens)"),
    ],
)
def test_what_the_models_configs_can_say_wrong(refuse, tiny_pipeline, tmp_path, model, file, changes, sentence):
    assert sentence in refuse(model=edit_config(tiny_pipeline(model), tmp_path, file, **changes))


def test_longer_positions_have_room_for_longer_texts(parse, refuse, tiny_pipeline, tmp_path):
    model = edit_config(tiny_pipeline("ZImage"), tmp_path, "transformer/config.json", axes_lens=[1536, 512, 512])
    assert parse("--max_sequence_length", 1504, model=model).max_sequence_length == 1504
    assert "ZImagePipeline draws with at most 1504" in refuse("--max_sequence_length", 1505, model=model)


@pytest.mark.parametrize("model", ["Sana", "Lumina2"])
def test_an_empty_prompt_that_would_be_a_negative_one(refuse, model):
    message = refuse("--validation_prompts", "a fox", "", model=model)
    assert f"--validation_prompts: to {model}Pipeline an empty prompt is a negative one" in message


def test_a_vae_of_other_channels(refuse, tmp_path):
    build_tiny_vae(latent_channels=8).save_pretrained(tmp_path / "vae")
    message = refuse("--pretrained_vae_model_name_or_path", tmp_path / "vae", model="Flux")
    assert "the VAE has 8 latent channels, the transformer takes 16: give the VAE that belongs to the" in message


@pytest.mark.parametrize("family", LATER)
def test_a_vae_with_twice_the_channels(refuse, tiny_pipeline, tmp_path, family):
    channels = channels_of(tiny_pipeline(family))
    vae = vae_of(family, tmp_path / "vae", latent_channels=2 * channels)
    message = refuse("--pretrained_vae_model_name_or_path", vae, model=family)
    assert (
        f"the VAE has {2 * channels} latent channels, the transformer takes {channels}: give the VAE that" in message
    )


@pytest.mark.parametrize("family", LATER)
@pytest.mark.parametrize("levels", [3, 5])
def test_a_vae_with_another_factor(parse, refuse, tiny_pipeline, tmp_path, family, levels):
    factor, channels = 2 ** (levels - 1), channels_of(tiny_pipeline(family))
    widths = {"block_out_channels": (8, 16, 16, 16, 16)[:levels], "latent_channels": channels}
    words = ["--pretrained_vae_model_name_or_path", vae_of(family, tmp_path / "vae", **widths), "--lpl_num_blocks", 2]
    if family in ("Lumina2", "HunyuanDiT"):
        sentence = f"the VAE makes a latent of {factor} x {factor} pixels, and {family}Pipeline counts on 8 x 8: give"
        message = refuse(*words, model=family)
        assert sentence in message and "--pretrained_vae_model_name_or_path" in message
        return
    assert parse(*words, model=family).latent_size == 64 // factor
    patch = 2 * factor
    message = refuse(*words, model=family, resolution=64 + factor)
    assert f"--resolution {64 + factor} must be a multiple of {patch}, the VAE's factor times the tra" in message


def test_stages_without_layers_are_no_blocks(parse, refuse, tiny_pipeline, tmp_path):
    sana = tiny_pipeline("Sana")
    stages = json.loads((sana / "vae" / "config.json").read_text())["decoder_layers_per_block"]
    stages[0] = 0
    fewer = edit_config(sana, tmp_path, "vae/config.json", decoder_layers_per_block=stages)
    blocks = len(stages)
    assert parse("--lpl_num_blocks", blocks, model=sana).lpl_num_blocks == blocks
    assert parse("--lpl_num_blocks", blocks - 1, model=fewer).lpl_num_blocks == blocks - 1
    message = refuse("--lpl_num_blocks", blocks, model=fewer)
    assert f"--lpl_num_blocks {blocks}: the VAE's decoder has {blocks - 1} up blocks, give that or fewer" in message


@pytest.mark.parametrize("part", ["tokenizer_3", "text_encoder_2", "transformer", "vae", "scheduler"])
def test_incomplete_models(refuse, tiny_pipeline, tmp_path, part):
    model = shutil.copytree(tiny_pipeline("StableDiffusion3"), tmp_path / "model")
    shutil.rmtree(model / part)
    assert f"there is no {model / part}" in refuse(model=model)


# A new transformer


def test_no_model(refuse):
    sentence = "no model: give --pretrained_model_name_or_path, or to train from scratch --transformer_config and"
    assert sentence in refuse(model=None)
    assert sentence in refuse("--transformer_config", CONFIGS / "dit-tiny.json", model=None)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "there is no {path}; give a transformer's config.json"),
        ('{"_class_name": ', "{path} can't be read (Expecting value"),
        ("[]", "{path} can't be read (it does not hold settings in braces)"),
        ("{}", "{path} has no _class_name"),
        ('{"_class_name": "UNet2DModel"}', "a new UNet2DModel needs --pretrained_model_name_or_path with the pipe"),
        ('{"_class_name": "DiTTransformer2DModel", "patch_size": 0}', "patch_size must be a whole number above 0"),
        (
            '{"_class_name": "DiTTransformer2DModel", "num_layers": 0}',
            "num_layers must be a whole number above 0, not 0",
        ),
        ('{"_class_name": "DiTTransformer2DModel", "in_channels": "4"}', "in_channels must be a whole number above 0"),
    ],
)
def test_files_that_describe_no_transformer(scratch, write, tmp_path, content, sentence):
    path = tmp_path / "none.json" if content is None else write(content)
    assert f"--transformer_config: {sentence.format(path=path)}" in scratch(config=path)


@pytest.mark.parametrize(
    "base, changes, words, sentence",
    [
        ("dit-tiny", {"in_channels": 16}, "", "the VAE has 4 latent channels, the transformer takes 16: give the VAE"),
        ("dit-tiny", {"in_channels": 16}, "", "or change in_channels of --transformer_config"),
        ("dit-tiny", {"out_channels": 2}, "", "--transformer_config: out_channels must be 4 (or 8, if it predicts"),
        ("dit-tiny", {"num_embeds_ada_norm": 10}, "", "--transformer_config: num_embeds_ada_norm must be 1000"),
        ("dit-tiny", {}, "--use_lora", "--transformer_config trains new weights, --use_lora adapters to trained"),
        (
            "dit-tiny",
            {},
            "--prediction_type flow_prediction",
            "DiTPipeline can't sample so; train a transformer of cl",
        ),
        ("dit-tiny", {}, "--weighting_scheme mode", "--weighting_scheme has no effect with epsilon prediction"),
        ("mmdit-tiny", {}, "--timestep_bias_strategy later --timestep_bias_multiplier 2", "no effect with flow"),
        (
            "mmdit-tiny",
            {},
            "--prediction_type v_prediction --mode_scale 1",
            "--mode_scale has no effect with v_predic",
        ),
        (
            "mmdit-tiny",
            {"pos_embed_max_size": 3},
            "",
            "the transformer has positions for 48 pixels (pos_embed_max_siz",
        ),
        ("mmdit-tiny", {"num_classes": 900}, "", "4 of the labels are not among the model's 900 classes"),
    ],
)
def test_a_new_transformer_that_does_not_fit(scratch, write, class_folders, tmp_path, base, changes, words, sentence):
    data = tmp_path / "numbers"  # its classes have no names yet
    for label, name in ((207, "golden retriever"), (980, "volcano")):
        shutil.copytree(class_folders / name, data / str(label))
    assert sentence in scratch(*words.split(), config=write(changes, base), data=data)


def test_a_new_transformer_in_a_pipeline_of_another(refuse, tiny_pipeline):
    message = refuse("--transformer_config", CONFIGS / "dit-tiny.json", model="StableDiffusion3")
    assert "--transformer_config: its _class_name is DiTTransformer2DModel, but the transformer of" in message
    assert "is a SD3Transformer2DModel: give the config of one of that class" in message


@pytest.mark.parametrize("base, changes", [("dit-tiny", {"norm_type": "none"}), ("mmdit-tiny", {"qk_norm": "none"})])
def test_values_that_only_the_transformer_can_refuse(train_dit, tiny_pipeline, class_folders, write, base, changes):
    words = ["--transformer_config", write(changes, base), "--pretrained_vae_model_name_or_path", tiny_pipeline("DiT")]
    with pytest.raises(
        arguments.UserError, match="^--transformer_config describes no .*Transformer2DModel: "
    ) as error:
        train_dit(*words, model=None, data=("--train_data_dir", class_folders))
    assert "none" in str(error.value) and "\n" not in str(error.value)


# Classes


def test_no_classes(refuse, photos, tmp_path):
    bare = shutil.copytree(photos, tmp_path / "bare")
    assert "the metadata has no label column label; choose one that is there with --label_column: text" in refuse(
        model="DiT", data=bare
    )
    assert "no label column kind" in refuse("--label_column", "kind", model="DiT", data=bare)
    (bare / "metadata.jsonl").unlink()
    message = refuse(model="DiT", data=bare)
    assert f"--train_data_dir {bare} has no classes, neither as sub-folders nor in metadata" in message


def test_labels_out_of_range(refuse, photos, tmp_path):
    data = shutil.copytree(photos, tmp_path / "data")
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    labelled = [{"file_name": row["file_name"], "label": 1000 if i == 0 else 999} for i, row in enumerate(rows)]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, labelled)))
    message = refuse(model="DiT", data=data)
    assert "1 of the labels are not among the model's 1000 classes, 0 to 999" in message
    assert rows[0]["file_name"] in message


def test_a_validation_prompt_that_is_no_class(parse, refuse):
    message = refuse("--validation_prompts", "volcano", "golden retrieve", model="DiT")
    assert "--validation_prompts golden retrieve is no class of the model: give a number below 1000 or a" in message
    assert "such as golden retriever" in message
    assert "--validation_prompts 1000 is no class" in refuse("--validation_prompt", 1000, model="DiT")
    assert parse("--validation_prompts", "volcano", "999", "tabby", model="DiT").validation_prompts


# LoRA and quantisation


@pytest.mark.parametrize(
    "words, content, sentence",
    [
        ("", BNB, "--bnb_quantization_config_path: quantised weights can't be trained; add --use_lora"),
        ("--use_lora", None, "there is no {path}; write one such as {{"),
        ("--use_lora", "load_in_4bit: true", "{path} can't be read ("),
        (
            "--use_lora",
            {"load_in_4bits": True},
            "there is no setting load_in_4bits in bitsandbytes: leave it out, or is",
        ),
        ("--use_lora", {"load_in_4bits": True}, "is load_in_4bit meant?"),
        ("--use_lora", {}, "{path} must say either load_in_4bit or load_in_8bit: true"),
        ("--use_lora", {**BNB, "load_in_8bit": True}, "{path} must say either load_in_4bit or load_in_8bit: true"),
        ("--use_lora", [4], "{path} can't be read (it does not hold settings in braces)"),
    ],
)
def test_quantisation_that_cannot_be(refuse, write, tmp_path, monkeypatch, words, content, sentence):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: name)
    path = tmp_path / "none.json" if content is None else write(content)
    message = refuse("--bnb_quantization_config_path", path, *words.split())
    assert sentence.format(path=path) in message and "--bnb_quantization_config_path" in message


def test_quantisation_knows_all_settings_of_diffusers():
    import inspect

    from diffusers import BitsAndBytesConfig

    settings = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    assert settings == set(model_checks.QUANTIZATION_KEYS)


def test_quantisation_without_its_package(refuse, write, monkeypatch):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    message = refuse("--use_lora", "--bnb_quantization_config_path", write(BNB))
    assert "--bnb_quantization_config_path needs a package" in message and "`pip install bitsandbytes`" in message


def test_lora_layers_that_are_not_there(train_dit, tiny_pipeline):
    with pytest.raises(arguments.UserError, match="--lora_layers attn.to_kk: no module has a name like this") as error:
        train_dit("--use_lora", "--lora_layers", "to_q,attn.to_kk", model=tiny_pipeline("StableDiffusion3"))
    assert "attn.to_k," in str(error.value) and "\n" not in str(error.value)


# Output, speed, help


def test_a_new_transformer_has_no_features_to_compare(scratch):
    message = scratch("--self_perceptual_weight", 1)
    assert "--self_perceptual_weight compares inside the model as it is at the start, which knows nothing" in message
    assert "with --transformer_config: train it without at first." in message


def test_without_the_diffusion_loss_noise_levels_may_still_be_drawn_in_other_ways(parse):
    parse("--l2_weight", 0, "--lpl_weight", 1, "--weighting_scheme", "mode")


def test_the_layers_of_a_transformer_are_numbers(parse, refuse):
    flags = ("--self_perceptual_weight", 1)
    assert "--sp_layer: invalid int value: 'mid'" in refuse(*flags, "--sp_layer", "mid")
    assert parse(*flags, "--sp_layers", 2, 1).sp_layers == ["2", "1"]
    assert parse(*flags, "--sp_layer", 0).sp_layers == ["0"]  # only the model can tell that it has no such layer


@pytest.mark.parametrize("flags", [("--sp_layer", 0), ("--sp_layer", 3), ("--sp_layers", 1, 3)])
def test_a_layer_that_the_transformer_lacks_is_refused_before_its_weights_are_loaded(
    train_dit, tiny_pipeline, monkeypatch, tmp_path, flags
):
    monkeypatch.setattr("family.Family.__init__", lambda *_: pytest.fail("it loads the model"))
    with pytest.raises(arguments.UserError, match=rf"{flags[0]} {flags[-1]}: this model has no .* are 1 to 2\.$"):
        train_dit("--self_perceptual_weight", 1, *flags, model=tiny_pipeline("StableDiffusion3"))
    assert not (tmp_path / "out").exists()


def test_a_saved_adapter_is_kept(refuse, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_model.safetensors").touch()
    assert "holds a saved model: choose another folder" in refuse(model="DiT")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    (tmp_path / "out" / "transformer").mkdir()
    (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors").touch()
    assert "holds a saved model: choose another folder" in refuse(model="DiT")


def test_what_has_no_stock_pipeline_is_saved_whole(scratch):
    message = scratch("--save_only_trained", config=CONFIGS / "mmdit-tiny.json")
    assert "--save_only_trained: diffusers has no ClassConditionalPipeline, its code is in whole ones" in message
    assert "--save_only_trained: there is no pipeline with the other parts" in scratch("--save_only_trained")


def test_answers_come_before_the_libraries_load(tiny_pipeline, class_folders):
    command = [sys.executable, "-X", "importtime", ROOT / "train_lpl_dit.py", "--train_data_dir", class_folders]
    words = ["--pretrained_model_name_or_path", tiny_pipeline("DiT"), "--report_to", "none", "--resolution", 64]
    command = [str(word) for word in (*command, *words, "--validation_prompt", "volcanoes")]
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and "volcanoes is no class of the model" in result.stderr
    assert "torch" not in result.stderr  # -X importtime lists every module that was imported
    result = subprocess.run([*command[:4], "--help"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "torch.nn" not in result.stderr
    assert all(flag in result.stdout for flag in flags_of(train_lpl_dit))


def test_the_commands_of_the_readme_are_accepted(tiny_pipeline, sd3, photos, class_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: name)
    shutil.copytree(class_folders / "volcano", tmp_path / "birds" / "house finch")
    names = {12: "house finch, linnet"}
    tiny = {
        "stabilityai/stable-diffusion-3.5-medium": sd3,
        "black-forest-labs/FLUX.1-dev": tiny_pipeline("Flux"),
        "black-forest-labs/FLUX.2-klein-base-4B": tiny_pipeline("Flux2Klein"),
        "Qwen/Qwen-Image": tiny_pipeline("QwenImage"),
        "Tongyi-MAI/Z-Image": tiny_pipeline("ZImage"),
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers": tiny_pipeline("Sana"),
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": tiny_pipeline("PixArtSigma"),
        "facebook/DiT-XL-2-256": edit_config(tiny_pipeline("DiT"), tmp_path, "model_index.json", id2label=names),
        "transformer_configs/mmdit-28x896.json": CONFIGS / "mmdit-28x896.json",
        "cross-attention/asymmetric-autoencoder-kl-x-1-5": tiny_pipeline("DiT") / "vae",
        "mmdit-256": "me/mmdit-256",  # the command before writes it
        "imagenet/train": class_folders,
        "photos": photos,
    }
    blocks = [block.split("```")[0] for block in (ROOT / "README.md").read_text().split("```bash")[1:]]
    commands = [block for block in blocks if "train_lpl_dit.py" in block]
    assert commands
    for command in commands:
        for line in command.splitlines():
            if line.startswith("echo"):
                subprocess.run(line, shell=True, check=True)
        words = shlex.split(command.replace("\\\n", " "))
        words = [str(tiny.get(word, word)) for word in words[words.index("train_lpl_dit.py") + 1 :]]
        args = train_lpl_dit.parse_args([*words, "--report_to", "none"])
        assert hasattr(args, "latent_size") or "me/mmdit-256" in words, "no tiny model, so nothing was checked"


# The scripts that users come from

MODELS = {  # what a flag needs
    "PixArtAlpha": "--prediction_type --timestep_bias_strategy --timestep_bias_multiplier --timestep_bias_portion "
    "--timestep_bias_begin --timestep_bias_end",
    "Flux": "--guidance_scale --aspect_ratio_buckets "  # the small SD3 has positions for 1024 pixels only
    "--output_kohya_format",
}
COMPANIONS = {"--mode_scale": ["--weighting_scheme", "mode"], "--use_dora": ["--use_lora"]}
COMPANIONS["--bnb_quantization_config_path"] = ["--use_lora"]
EXAMPLES = {(flag, *entry["example"]) for flags in DIFFUSERS.values() for flag, entry in flags.items()}


@pytest.fixture
def accepts(sd3, tiny_pipeline, photos, tmp_path, monkeypatch, capsys):
    """Whether the script takes a flag as the other scripts do; checks what it says if not."""
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(photos)
    (tmp_path / "bnb.json").write_text(json.dumps(BNB))

    def run(flag, *example):
        model = next((tiny_pipeline(model) for model, flags in MODELS.items() if flag in flags.split()), sd3)
        words = [*words_with(flag, example), *COMPANIONS.get(flag, ())]
        words[words.index("--pretrained_model_name_or_path") + 1] = str(model)
        try:
            args = train_lpl_dit.parse_args(words)
        except SystemExit as exit:
            assert exit.code == 2
            return False
        if flag == "--bnb_quantization_config_path":
            return args.bnb_quantization_config_path == BNB
        return flag == "--pretrained_model_name_or_path" or lands(args, flag, example)

    return run


@pytest.mark.parametrize("words", sorted(EXAMPLES), ids=" ".join)
def test_a_flag_of_the_other_scripts_works_or_is_refused_with_an_alternative(accepts, known_flags, capsys, words):
    if accepts(*words):
        return
    flag, message = words[0], capsys.readouterr().err
    assert message.count("\n") == 1 and message.endswith(".\n") and f"error: {flag} " in message
    others = named_flags(message) - {flag}
    assert others <= known_flags | set(arguments.REFUSED)
    assert others & known_flags or "leave it out" in message or "leave both out" in message


def test_exactly_these_flags_of_the_other_scripts_are_refused(accepts):
    refused = {words[0] for words in sorted(EXAMPLES) if not accepts(*words)}
    assert refused == set(
        # of the scripts for UNets
        "--input_perturbation --dream_training --dream_detail_preservation --non_ema_revision --debug_loss "
        "--enable_xformers_memory_efficient_attention --enable_npu_flash_attention --local_rank --local-rank "
        # DreamBooth's
        "--with_prior_preservation --class_data_dir --class_prompt "
        "--num_class_images --prior_loss_weight --sample_batch_size --prior_generation_precision --repeats "
        "--train_text_encoder --text_encoder_lr --adam_weight_decay_text_encoder --precondition_outputs --lora_blocks "
        "--upcast_before_saving --final_validation_prompt --use_aspect_ratio_buckets --caption_dropout "
        # of one family
        "--complex_human_instruction --enable_vae_tiling --do_fp8_training --text_encoder_out_layers "
        "--remote_text_encoder --fsdp_text_encoder --micro_conditions --max_token_length --use_rslora --system_prompt "
        "--pretrained_tokenizer_4_name_or_path --pretrained_text_encoder_4_name_or_path".split()
    )


def test_what_is_refused_is_known_elsewhere():
    ours = flags_of(train_lpl_sd), flags_of(train_lpl_dit)
    assert set(arguments.REFUSED) == set(ALL_FLAGS).union(*ours) - set.intersection(*ours)


@pytest.mark.parametrize(
    "script, model, other",
    [
        ("train_dreambooth_sd3.py", "StableDiffusion3", "--max_sequence_length"),
        ("train_dreambooth_lora_sd3.py", "StableDiffusion3", "--max_sequence_length"),
        ("train_dreambooth_flux.py", "Flux", "--max_sequence_length --guidance_scale"),
        ("train_dreambooth_lora_flux.py", "Flux", "--max_sequence_length --guidance_scale"),
        ("train_dreambooth_lora_sana.py", "Sana", "--max_sequence_length"),
        ("train_dreambooth_lora_flux2_klein.py", "Flux2Klein", "--max_sequence_length --guidance_scale"),
        ("train_dreambooth_lora_qwen_image.py", "QwenImage", "--max_sequence_length"),
        ("train_dreambooth_lora_z_image.py", "ZImage", "--max_sequence_length --guidance_scale"),
        ("train_dreambooth_lora_lumina2.py", "Lumina2", "--max_sequence_length"),
        ("train_pixart_lora_hf.py", "PixArtSigma", "--learning_rate --caption_column"),
    ],
)
def test_the_defaults_are_those_of_the_other_scripts_but_for_these(parse, sd3, script, model, other):
    args = parse(model=sd3 if model == "StableDiffusion3" else model, resolution=None)
    defaults = {flag: entry["default"] for flag, entry in DIFFUSERS[script].items()}
    folders = ("--train_data_dir", "--instance_data_dir", "--output_dir")
    for flag in ("--pretrained_model_name_or_path", *folders, "--report_to"):
        defaults.pop(flag, None)
    ours = {flag: getattr(args, flag.removeprefix("--")) for flag in flags_of(train_lpl_dit) & set(defaults)}
    always = {"--image_column", "--validation_epochs"}  # found in the data; 500 steps instead
    if "dreambooth" in script:  # for five photos of one thing: small batches, few steps
        always |= {"--train_batch_size", "--num_train_epochs", "--adam_weight_decay", "--optimizer"}  # AdamW, adamw
    assert {flag for flag, value in ours.items() if value != defaults[flag]} == always | set(other.split())


@pytest.mark.parametrize(
    "family, kind, config, sentence",
    [
        ("StableDiffusion3", "AsymmetricAutoencoderKL", {}, "AsymmetricAutoencoderKL, which StableDiffusion3Pipeline"),
        ("Flux", "AutoencoderKL", {}, "no shift_factor, which FluxPipeline reads"),
        ("PixArtSigma", "AutoencoderDC", {}, "AutoencoderDC, which PixArtSigmaPipeline can't sample with"),
        ("Sana", "AutoencoderKL", {}, "AutoencoderKL, which SanaPipeline can't sample with"),
        *(
            (family, kind, {}, f"the VAE is a {kind}, which {family}Pipeline can't sample with: give another")
            for family, kinds in (
                ("DiT", "AutoencoderKLFlux2 AutoencoderKLQwenImage"),
                ("StableDiffusion3", "AutoencoderKLFlux2"),
                ("Flux", "AutoencoderKLQwenImage"),
                ("PixArtSigma", "AutoencoderKLFlux2"),
                ("Sana", "AutoencoderKLQwenImage"),
                ("Flux2Klein", "AutoencoderKL AutoencoderTiny AutoencoderKLQwenImage"),
                ("QwenImage", "AutoencoderKL AutoencoderTiny AutoencoderKLFlux2"),
                ("ZImage", "AsymmetricAutoencoderKL AutoencoderDC AutoencoderKLFlux2"),
                ("Lumina2", "AsymmetricAutoencoderKL AutoencoderKLQwenImage"),
                ("AuraFlow", "AutoencoderDC AutoencoderKLFlux2"),
                ("HunyuanDiT", "AutoencoderDC AutoencoderKLQwenImage"),
            )
            for kind in kinds.split()
        ),
        ("ZImage", "AutoencoderKL", {}, "no shift_factor, which ZImagePipeline reads"),
        ("Lumina2", "AutoencoderKL", {}, "no shift_factor, which Lumina2Pipeline reads"),
    ],
)
def test_a_vae_that_the_stock_pipeline_cannot_take(refuse, tiny_pipeline, tmp_path, family, kind, config, sentence):
    model = tiny_pipeline(family)
    build_tiny_vae(kind, latent_channels=channels_of(model), **config).save_pretrained(tmp_path / "vae")
    message = refuse("--pretrained_vae_model_name_or_path", tmp_path / "vae", model=model)
    assert sentence in message and "--pretrained_vae_model_name_or_path" in message


def test_a_transformer_config_says_what_the_classes_have_other_defaults_for(scratch, write):
    config = {"_class_name": "ClassConditionalSD3Transformer2DModel", "in_channels": 4, "out_channels": 4}
    assert "--transformer_config does not say patch_size: add it" in scratch(config=write(config))


@pytest.fixture
def changed(tiny_pipeline, write):
    """family, keys to leave out, values -> the flags for a new transformer with that config."""

    def run(family, without=(), **values):
        config = json.loads((tiny_pipeline(family) / "transformer" / "config.json").read_text()) | values
        return "--transformer_config", write({name: value for name, value in config.items() if name not in without})

    return run


@pytest.mark.parametrize(
    "family, needed",
    [
        *(
            (family, "in_channels out_channels patch_size")
            for family in LATER
            if family not in ("ZImage", "HunyuanDiT")
        ),
        ("ZImage", "in_channels"),
        ("HunyuanDiT", "in_channels patch_size"),
    ],
)
def test_what_the_config_of_a_new_transformer_must_say(parse, refuse, changed, family, needed):
    for name in ("in_channels", "out_channels", "patch_size"):
        words = changed(family, without=[name])
        if name in needed.split():
            assert f"--transformer_config does not say {name}: add it." in refuse(*words, model=family)
        else:
            assert parse(*words, model=family).transformer_config


@pytest.mark.parametrize("family", LATER)
def test_channels_of_a_new_transformer_that_the_vae_lacks(refuse, tiny_pipeline, changed, family):
    channels = channels_of(tiny_pipeline(family))
    packed = 4 if family in PACKED else 1
    message = refuse(*changed(family, in_channels=2 * channels * packed), model=family)
    assert f"the VAE has {channels} latent channels, the transformer takes {2 * channels}: give the VAE" in message
    assert message.endswith(", or change in_channels of --transformer_config.\n")


@pytest.mark.parametrize("family", ["Flux2Klein", "QwenImage", "Lumina2", "AuraFlow"])
def test_a_new_transformer_whose_output_is_no_latent(refuse, tiny_pipeline, changed, family):
    wanted = json.loads((tiny_pipeline(family) / "transformer" / "config.json").read_text())["out_channels"]
    wanted = wanted or 16  # FLUX.2's says nothing
    for wrong in (12, 2 * wanted):
        message = refuse(*changed(family, out_channels=wrong), model=family)
        assert f"--transformer_config: out_channels must be {wanted}, not {wrong}." in message


@pytest.mark.parametrize(
    "family, changes, sentence",
    [
        ("Flux", {"patch_size": 2}, "patch_size must be 1, as FluxPipeline counts on, not 2."),
        ("Flux2Klein", {"patch_size": 4}, "patch_size must be 1, as Flux2KleinPipeline counts on, not 4."),
        ("QwenImage", {"patch_size": 1}, "patch_size must be 2, as QwenImagePipeline counts on, not 1."),
        ("ZImage", {"all_patch_size": [4]}, "all_patch_size must be [2], as ZImagePipeline counts on, not [4]."),
        (
            "HunyuanDiT",
            {"learn_sigma": False},
            "learn_sigma must be true, its pipeline counts on a predicted variance.",
        ),
    ],
)
def test_what_the_pipelines_count_on(refuse, changed, family, changes, sentence):
    assert f"--transformer_config: {sentence}" in refuse(*changed(family, **changes), model=family)


@pytest.mark.parametrize(
    "family, name, width",
    [
        ("Flux2Klein", "joint_attention_dim", 24),
        ("QwenImage", "joint_attention_dim", 16),
        ("ZImage", "cap_feat_dim", 16),
        ("Lumina2", "cap_feat_dim", 16),
        ("AuraFlow", "joint_attention_dim", 32),
        ("HunyuanDiT", "cross_attention_dim", 24),
        ("HunyuanDiT", "cross_attention_dim_t5", 32),
    ],
)
def test_a_new_transformer_takes_the_widths_of_the_text_encoders(parse, changed, family, name, width):
    assert find_family(parse(*changed(family), model=family))
    sentence = f"--transformer_config: {name} must be {width}, the width of the pipeline's text embeddings, not 40."
    with pytest.raises(arguments.UserError) as error:
        find_family(parse(*changed(family, **{name: 40}), model=family))
    assert str(error.value) == sentence
    with pytest.raises(arguments.UserError, match=f"{name} must be {width}, .* not "):  # the class's own default
        find_family(parse(*changed(family, without=[name]), model=family))


@pytest.mark.parametrize(
    "family, part, changes, sentence",
    [
        ("StableDiffusion3", "scheduler", "EulerDiscreteScheduler", "EulerDiscreteScheduler without flow matching"),
        *(
            (family, "scheduler", "DDIMScheduler", f"a DDIMScheduler without flow matching, which {family}Pipeline")
            for family in LATER
            if family != "HunyuanDiT"
        ),
        ("PixArtSigma", "text_encoder", [None, None], "the model has no text_encoder: give one that is complete"),
        ("Flux2Klein", "text_encoder", [None, None], "the model has no text_encoder: give one that is complete"),
        ("HunyuanDiT", "text_encoder_2", [None, None], "the model has no text_encoder_2: give one that is complete"),
    ],
)
def test_parts_that_do_not_fit(refuse, tiny_pipeline, tmp_path, family, part, changes, sentence):
    if part == "scheduler":
        model = edit_config(tiny_pipeline(family), tmp_path, "scheduler/scheduler_config.json", _class_name=changes)
    else:
        model = edit_config(tiny_pipeline(family), tmp_path, "model_index.json", **{part: changes})
    assert sentence in refuse(model=model)
