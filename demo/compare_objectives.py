"""Finetune the demo's small Stable Diffusion with each of the perceptual objectives, and compare what they draw.

    python demo/compare_objectives.py

ends with `demo/output/objectives/report.html` and `report.md`. All arms start from `demo/model` and see the same
batches and the same noise, for as many steps, whatever a step costs. The network of E-LatentLPIPS is trained here as
well, on the demo's photographs. What is already there is reused; delete `demo/output` to start again.
"""

import shlex
import subprocess
import sys

from run_demo import MODEL, OUTPUT, PHOTOS, environment, finetune, launch, parse_args


CLASSIFIER, REPORT = OUTPUT / "latent-classifier", OUTPUT / "objectives"
LPIPS = f"--e_latent_lpips_model {CLASSIFIER.as_posix()} --e_latent_lpips_weight variance:0.1"
# Where there is a weight to choose, that of Table 5
ARMS = {
    "l2": "--lpl_weight 0",
    "l2+LPL": "--lpl_weight auto --lpl_target_share 0.2",
    "self-perceptual": "--lpl_weight 0 --l2_weight 0 --self_perceptual_weight 1",
    "l2+self-perceptual": "--lpl_weight 0 --self_perceptual_weight variance:0.1",
    "l2+E-LatentLPIPS": f"--lpl_weight 0 {LPIPS}",
    "l2+E-LatentLPIPS gated": f"--lpl_weight 0 {LPIPS} --gate_objectives e_latent_lpips",
    "l2+RGB": "--lpl_weight 0 --rgb_weight variance:0.1",
    "min-SNR": "--lpl_weight 0 --snr_gamma 5",
    "Eq. 15": "--late_reweight",
}


def run(command):
    print(f"\n$ {shlex.join(command)}\n", flush=True)
    subprocess.run(command, check=True, env=environment())


def train_classifier(args):
    """A network that tells the subjects of the photographs, which their captions name, from latents."""
    if (CLASSIFIER / "config.json").exists():
        return print(f"\nReusing the network in {CLASSIFIER}.")
    run(
        shlex.split(
            f"{launch()} train_latent_classifier.py --pretrained_model_name_or_path {MODEL.as_posix()} --width 0.25 "
            f"--train_data_dir {(PHOTOS / 'train').as_posix()} --label_column text --resolution 128 --random_flip "
            f"--num_train_epochs 20 --train_batch_size 32 --seed {args.seed} --output_dir {CLASSIFIER.as_posix()}"
        )
    )


def compare(args):
    """All arms and the model that they began with, in pairs."""
    folders = [MODEL, *(OUTPUT / name_of(arm) for arm in ARMS)]
    command = shlex.split(
        f"{launch()} evaluate_lpl.py --reference {(PHOTOS / 'train').as_posix()} --resolution 128 --num_samples 140 "
        f"--num_inference_steps 25 --guidance_scale {args.guidance_scale} --feature_extractor demo/features "
        f"--output_dir {REPORT.as_posix()}"
    )
    run([*command, "--model", *(folder.as_posix() for folder in folders), "--names", "before", *ARMS])


def name_of(arm):
    """Its folder; the demo's own two are shared."""
    return {"l2": "l2", "l2+LPL": "lpl"}.get(arm, arm.replace("l2+", "with-").replace(" ", "-").lower())


def main():
    args = parse_args()
    from prepare_photos import prepare_photos

    prepare_photos(PHOTOS)
    train_classifier(args)
    for arm, flags in ARMS.items():
        finetune(OUTPUT / name_of(arm), flags, args)
    compare(args)


if __name__ == "__main__":
    sys.exit(main())
