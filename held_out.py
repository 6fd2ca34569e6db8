"""How a model does, while it is trained, on images that it is not trained on: `--eval_steps`.

The losses at fixed noise levels and, with --eval_samples, the distance of samples to these images.
"""

from collections import defaultdict
from contextlib import suppress
from functools import partial

import torch
from accelerate.utils import gather_object

from arguments import UserError, as_flags
from data_utils import held_out_batch, held_out_caption
from evaluation import ListedImages, StreamImages, measure
from features import load_extractor
from loss_terms import make_lpl
from metrics import frechet_distance, kernel_distances, moments
from train_utils import draw_share, drawing_settings, ema_weights


LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # quantiles of the noise levels as they are trained
LOSS_IMAGES = 64  # cheap enough for every epoch
REFERENCE_IMAGES = 5_000


class HeldOut:
    """What the --eval_ flags ask for; noise, captions and order are the same at every step.

    stream: the held-out images, as a `TrainingStream`.
    """

    def __init__(self, accelerator, args, family, lpl, stream):
        self.accelerator, self.args, self.family, self.stream = accelerator, args, family, stream
        self.lpl = lpl
        if lpl is None:  # to be compared with runs that have it
            with suppress(UserError):
                self.lpl = make_lpl(args, family.vae, family.unscale)
        if args.eval_samples:
            self.images = StreamImages(stream, REFERENCE_IMAGES)
            if len(self.images) < 2:
                raise UserError("--eval_samples needs at least 2 images held out: raise --eval_share, or add images.")
            with as_flags(feature_extractor="eval_feature_extractor"):
                self.extractor = load_extractor(args.eval_feature_extractor, "cpu", args.cache_dir)
            self.seen, self.reference = False, None  # the held-out images as the main process has measured them

    def is_due(self, step):
        return step % self.args.eval_steps == 0

    @torch.no_grad()
    def __call__(self, training_step, weights, ema):
        """{name: number} for the log, of the average weights if there are any. All processes call this.

        training_step: LPL, batch -> `Forward`.
        """
        self.family.model.eval()
        with ema_weights(ema, weights), self.family.on_device("decoder"):
            found = self.losses(training_step)
            if self.args.eval_samples:
                found |= self.distances(weights)
        self.family.model.train()
        return found

    def losses(self, training_step):
        """Means of the diffusion loss and, where it applies, LPL: over all levels, and at each, by its sigma/alpha."""
        count, size = min(len(self.stream.samples), LOSS_IMAGES), self.args.train_batch_size
        batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        unknown = self.args.lpl_weighting == "balanced" and self.lpl is not None and self.lpl.weight is None
        lpl = None if unknown else self.lpl  # balanced weights are measured when LPL starts
        found = []
        for first in range(0, len(batches), world):
            indices = batches[min(first + rank, len(batches) - 1)]  # all call the model as often: it may be sharded
            batch = held_out_batch(self.stream, indices)
            batch["posteriors"] = self.family.encode_images(batch.pop("pixel_values"))
            for number, level in enumerate(LEVELS):
                positions = batch["positions"] + number * LOSS_IMAGES
                quantiles = torch.full((len(indices),), level, dtype=torch.float64)
                forward = training_step(lpl, {**batch, "positions": positions, "quantiles": quantiles})
                if first + rank < len(batches):
                    found.append((len(indices), f"{forward.noise_levels[0]:.3g}", losses_of(forward)))
        return averages(gather_object(found))

    def distances(self, weights):
        """Kernel and Frechet distance of drawings to the held-out images; nothing after a signal."""
        args, family, accelerator = self.args, self.family, self.accelerator
        settings = drawing_settings(args, family)

        def task(i):
            caption = held_out_caption(self.stream, i % len(self.stream.samples))
            return lambda draw: draw(str(caption), torch.Generator().manual_seed(args.seed + i), **settings)

        drawn = draw_share(accelerator, family, weights, [task(i) for i in range(args.eval_samples)])
        if drawn is None:
            return {}
        see = partial(measure, extractors=[self.extractor], batch_size=args.train_batch_size)
        self.extractor.to(accelerator.device)
        with as_flags(feature_extractor="eval_feature_extractor"):
            if not self.seen:
                self.seen, self.reference = True, see(accelerator, self.images, title="Measuring held-out images")
            samples = see(accelerator, ListedImages(dict(drawn), args.eval_samples), title="Measuring samples")
        self.extractor.to("cpu")
        if not accelerator.is_main_process:
            return {}
        ours, theirs = (measured.features[self.extractor.name] for measured in (samples, self.reference))
        everything = torch.ones(1, len(ours), dtype=torch.bool)
        return {
            "eval_frechet_distance_small_sample": frechet_distance(moments(ours), moments(theirs)),
            "eval_kernel_distance_small_sample": kernel_distances(ours, theirs, everything).item(),
        }


def losses_of(forward):
    """Name -> number, of one forward pass; LPL where it applies."""
    terms = {"l2": forward.diffusion_loss}
    if forward.lpl_stats and len(forward.lpl_stats["chosen"]):
        terms["lpl"] = forward.lpl_loss
    found = {name: term.item() for name, term in (terms | forward.objective_losses).items()}
    return {name: value for name, value in found.items() if value or name in terms}  # 0: the gate kept all out


def averages(found):
    """(count, level, losses) of all forward passes -> means, of each loss over all its levels and at each of them."""
    sums = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    for count, level, losses in found:
        for name, value in losses.items():
            for key in (f"eval_{name}", f"eval_{name}_at_{level}"):
                sums[key] += torch.tensor([count * value, count])
    return {key: (total / count).item() for key, (total, count) in sums.items()}
