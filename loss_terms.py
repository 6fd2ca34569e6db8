"""The terms of the loss as the flags ask for them, and their weights: given, or measured once.

l2    the diffusion loss, weighted by noise level (`loss_weights`)
lpl   the Latent Perceptual Loss (`make_lpl`)
self_perceptual, e_latent_lpips, rgb, clean_latent    what it is compared with (`Objectives`)
"""

import math
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from arguments import OBJECTIVES, UserError
from counters import without_values
from engines import engine_name
from frozen import FrozenDenoiser, layers_of
from latent_lpips import LatentVGG, load_latent_lpips
from lean_backward import lean_backward
from loading import from_config_without_values
from lpl_utils import LatentPerceptualLoss, calibrate, compare_gradients, sigma_gate, summarize
from model_checks import latent_channels
from objectives import RGB, CleanLatent, ELatentLPIPS, LateReweighting, SelfPerceptual, gated_losses, min_snr_weight


CALIBRATION_BATCHES, MOST_CALIBRATION_BATCHES = 16, 512  # more than 16 only to see
CALIBRATION_SAMPLES = 16  # with little enough noise


def make_lpl(args, vae, unscale=None):
    """The Latent Perceptual Loss that the `--lpl_` flags describe. Raises UserError if this VAE can't give it."""
    if args.lpl_compile and args.buckets:  # each block is compiled for every size, which torch takes for a mistake
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, len(args.buckets) * (args.lpl_num_blocks + 1))
    try:
        lpl = LatentPerceptualLoss(
            vae,
            num_blocks=args.lpl_num_blocks,
            normalization=args.lpl_normalization,
            detach_stats=args.lpl_detach_stats,
            weighting=args.lpl_weighting,
            reduction=args.lpl_reduction,
            mask_outliers=args.lpl_outlier_mask,
            outlier_source=args.lpl_outlier_source,
            outlier_positions=args.lpl_outlier_positions,
            chunk_size=args.lpl_chunk_size,
            unscale=unscale,
            gradient_checkpointing=args.lpl_gradient_checkpointing,
            compile_backend=None if args.dry_run else args.lpl_compile,
            channels_last=args.lpl_channels_last,
        )
    except ValueError as error:
        raise UserError(f"LPL can't be computed: {error} (--lpl_weight 0 trains without it)") from error
    if args.lpl_weighting != "balanced":  # else something is left to be measured
        lpl.weight = given_weights(args).get("lpl")
    return lpl


def lpl_threshold(args):
    """tau, the highest sigma / alpha to which LPL applies: in proportion to the resolution (Sec. 4.1)."""
    return args.lpl_sigma_threshold * args.resolution / args.lpl_base_resolution


class Objectives:
    """What is compared besides latents and the decoder's features: the objectives with a weight, by name.

    Args:
        terms: name -> objective.
        gated: names of those that see only samples with sigma / alpha at most tau.
        sizes: name -> how many samples an objective gets in any case (see `objectives.gated_losses`).
        late: a LateReweighting, or None.
    """

    def __init__(self, terms, gated=(), tau=None, sizes=None, late=None):
        self.terms, self.gated, self.tau, self.sizes, self.late = terms, gated, tau, sizes or {}, late
        self.weights = dict.fromkeys(terms)  # None until they are known

    def losses(self, prediction, generators):
        """Name -> losses `[B]`, 0 for samples that the gate keeps out.

        generators: a number, another one for each objective -> one generator per sample, on the CPU.
        """
        everything = torch.ones(len(prediction.t), dtype=torch.bool)
        gate = sigma_gate(prediction.alpha, prediction.sigma, self.tau) if self.gated else everything
        found = {}
        for name, objective in self.terms.items():
            passing, draws = gate if name in self.gated else everything, generators(2 + OBJECTIVES.index(name))
            found[name] = gated_losses(objective, prediction, passing, draws, self.sizes.get(name))
        return found

    def reweigh(self, l2, lpl, lpl_stats, alpha, sigma):
        """The diffusion losses `[B]` as a training step adds them: with --late_reweight, weighted by Eq. 15."""
        if self.late is None or lpl is None or not torch.is_grad_enabled():
            return l2
        self.late.update(l2.detach(), lpl_stats["sample_loss"])
        return l2 * self.late.weights(alpha, sigma, lpl.weight)

    @property
    def modules(self):
        """The frozen networks that are there for them alone."""
        return [module for objective in self.terms.values() for module in getattr(objective, "modules", ())]

    def state_dict(self):
        late = self.late is not None and self.late.sums is not None
        return {"weights": self.weights, "late": self.late.sums.cpu() if late else None}

    def load_state_dict(self, state):
        """What was measured is not measured again."""
        self.weights |= state["weights"]
        if self.late is not None and state["late"] is not None:
            self.late.sums = torch.tensor(state["late"], dtype=torch.float64)


NO_OBJECTIVES = Objectives({})


def make_objectives(accelerator, args, family):
    """The objectives beside LPL that have a weight, bound to their frozen networks.

    Called before `engines.prepare` and before a checkpoint is loaded: the model is as it was when training began.
    """
    makers = {"self_perceptual": make_self_perceptual, "e_latent_lpips": make_e_latent_lpips, "rgb": make_rgb}
    makers |= {"clean_latent": lambda args, family: CleanLatent()}
    names = [name for name in OBJECTIVES if getattr(args, f"{name}_weight") != 0]
    terms = {name: makers[name](args, family) for name in names}
    sizes = {}
    if args.use_lora and engine_name(accelerator) in ("FSDP2", "ZeRO-3"):  # its weights are gathered as it runs
        sizes["self_perceptual"] = args.train_batch_size
    tau = lpl_threshold(args)
    late = LateReweighting(tau, partial(accelerator.reduce, reduction="sum")) if args.late_reweight else None
    objectives = Objectives(terms, args.gate_objectives or (), tau, sizes, late)
    for name in sizes.keys() & terms.keys() if "--lpl_chunk_size" not in args.given_flags else ():
        terms[name].chunk_size = 0  # every pass would gather them anew
    objectives.weights |= {name: weight for name, weight in given_weights(args).items() if name in terms}
    return objectives


def make_self_perceptual(args, family):
    """Lin & Yang's objective in the layers of --sp_layer or --sp_layers, by default the middle of a UNet."""
    frozen = FrozenDenoiser(family, layers_of(args.sp_layers, family.blocks), family.weight_dtype)
    return SelfPerceptual(
        frozen,
        family.timesteps,
        family.noise_levels,
        timestep=args.sp_timestep,
        distance=args.sp_distance,
        formulation=args.sp_formulation,
        chunk_size=args.lpl_chunk_size,
    )


def make_e_latent_lpips(args, family):
    if args.dry_run:
        config = {"in_channels": latent_channels(family.vae.config)}  # the published ones', but for one of one's own
        if Path(args.e_latent_lpips_model, "config.json").exists():
            config = LatentVGG.load_config(args.e_latent_lpips_model)
        network = from_config_without_values(LatentVGG, config, torch.float32)
        network = without_values(network).requires_grad_(False)
    else:
        network = load_latent_lpips(args.e_latent_lpips_model, family.vae.config, args.cache_dir).to(family.device)
    return ELatentLPIPS(network, args.e_latent_lpips_augmentations or (), chunk_size=args.lpl_chunk_size)


def make_rgb(args, family):
    vae = family.vae
    if args.lpl_gradient_checkpointing and getattr(vae, "_supports_gradient_checkpointing", False):
        vae.enable_gradient_checkpointing()

    def decode(latents):
        with lean_backward(not getattr(vae.decoder, "gradient_checkpointing", False)):
            return family.decode(latents)

    return RGB(decode, chunk_size=args.lpl_chunk_size)


def rule_of(weight, share=0.2):
    """A weight's flag -> ("number", w), ("auto", share of the loss) or ("variance", ratio to the diffusion loss's)."""
    kind, _, number = str(weight).partition(":")
    if kind == "auto":
        return kind, float(number or share)
    return ("variance", float(number)) if kind == "variance" else ("number", float(weight))


def given_weights(args):
    """Name -> weight, of the terms beside l2 whose flag gives a number."""
    rules = {name: rule_of(getattr(args, f"{name}_weight")) for name in ("lpl", *OBJECTIVES)}
    return {name: number for name, (kind, number) in rules.items() if kind == "number"}


def describe_gate(args, family):
    """Whom the gate concerns and how many samples pass it, a sentence, or None. Raises UserError if none ever does."""
    names = ["LPL"] * (args.lpl_weight != 0) + (args.gate_objectives or [])
    if not names:
        return None
    tau = lpl_threshold(args)
    share = lpl_share(family, tau)
    if share == 0:
        threshold = f"--lpl_sigma_threshold {args.lpl_sigma_threshold}"
        raise UserError(f"{threshold}: all noise levels of this model are higher, so that no sample passes: raise it.")
    verb = "applies" if len(names) == 1 else "apply"
    return f"{' and '.join(names)} {verb} to {share:.1%} of the samples (sigma/alpha at most {tau:g})."


def weighted_terms(args, lpl, objectives, forward):
    """The terms of the loss as they are added, name -> `[]`; `lpl` is None before it starts."""
    terms = {"l2": args.l2_weight * forward.diffusion_loss}
    if lpl is not None and objectives.late is None:
        terms["lpl"] = lpl.weight * forward.lpl_loss
    return terms | {name: objectives.weights[name] * loss for name, loss in forward.objective_losses.items()}


def diagnose(lpl, objectives, forward, terms):
    """What a log says besides of LPL, if it has started, and of the gate: name -> number."""
    found = {}
    if objectives.gated:
        own = min(map(len, forward.sample_losses.values()))  # without images of the class
        found["gated_share"] = (forward.noise_levels[:own] <= objectives.tau).float().mean().item()
    if lpl is None:
        return found
    found |= summarize(forward.lpl_stats)
    if objectives.late is not None:
        return found | objectives.late.summary(lpl.weight)
    return found | compare_gradients(forward.model_pred, terms["l2"], terms["lpl"])


def is_measured(lpl, objectives):
    """Whether all weights are known, and the variances of Eq. 15; `lpl` is None before it starts."""
    late = objectives.late is None or objectives.late.sums is not None
    return (lpl is None or lpl.weight is not None and late) and None not in objectives.weights.values()


def measure_weights(accelerator, args, lpl, objectives, step, batches):
    """Measure the weights that the flags leave open, and the variances with which Eq. 15 begins.

    Nothing is trained, and the random state stays. `auto` makes a term a given share of the whole loss (Fig. 9);
    `variance:r` makes the variance of its samples' losses r times that of the diffusion loss (App. A.4). Over batches
    and processes, and with the zeros of samples that a gate keeps out: both are about the terms as they are added.

    Args:
        lpl: the loss, or None as long as it has not started; step: batch -> `Forward`; batches: an iterator.
    """
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    reduce, tau = partial(accelerator.reduce, reduction="sum"), lpl_threshold(args)
    wanted = CALIBRATION_SAMPLES if lpl is not None or objectives.gated else 0
    forwards, seen = [], 0
    with torch.no_grad(), torch.random.fork_rng(devices):
        for batch in islice(batches, MOST_CALIBRATION_BATCHES):
            forwards.append(step(batch)._replace(model_pred=None))
            seen += (forwards[-1].noise_levels <= tau).sum().item()
            enough = len(forwards) >= CALIBRATION_BATCHES
            if enough and reduce(torch.tensor(seen, device=accelerator.device)) >= wanted:
                break
        weights = Weights(args, lpl, objectives, forwards, reduce)
        weights.solve()
        for forward in forwards if lpl is not None and objectives.late is not None else ():
            objectives.late.update(weights.own(forward, "l2"), weights.own(forward, "lpl"))
    names = ["LPL" if name == "lpl" else name for name in weights.open_rules] or ["variances"]
    accelerator.print(f"Measured {', '.join(names)} on {len(forwards)} batches.")
    for name in weights.open_rules:
        if name == "lpl":
            omega = [round(weight, 5) for weight in lpl.omega.tolist()]
            accelerator.print(f"LPL's weight is {lpl.weight:.5g}; its blocks' weights are {omega}.")
        else:
            accelerator.print(f"The weight of {name} is {objectives.weights[name]:.5g}.")


class Weights:
    """Those that are open, from what `measure_weights` has seen. forwards: its `Forward`s, without predictions."""

    def __init__(self, args, lpl, objectives, forwards, reduce):
        self.lpl, self.objectives, self.forwards, self.reduce = lpl, objectives, forwards, reduce
        self.rules = {name: rule_of(getattr(args, f"{name}_weight")) for name in objectives.terms}
        self.known = {"l2": args.l2_weight, **objectives.weights}
        if lpl is not None:
            self.rules["lpl"] = rule_of(args.lpl_weight, args.lpl_target_share)
            self.known["lpl"] = lpl.weight
        self.open_rules = {name: self.rules[name] for name, weight in self.known.items() if weight is None}

    def solve(self):
        """Sets the weights. Raises UserError."""
        open_rules = self.open_rules
        if "lpl" in open_rules and (open_rules["lpl"][0] != "auto" or self.lpl.weighting == "balanced"):
            self.calibrate(None)  # the blocks' weights
        for name, (kind, number) in open_rules.items():
            if kind == "number":
                self.known[name] = number
            elif kind == "variance":
                variance = self.positive(name, self.variance(name))
                l2 = self.positive("l2", self.known["l2"] ** 2 * self.variance("l2"))
                self.known[name] = math.sqrt(number * l2 / variance)
        shares = {name: share for name, (kind, share) in open_rules.items() if kind == "auto"}
        fixed, of_lpl = self.total(self.fixed), shares.pop("lpl", 0)
        rest = 1 - sum(shares.values())
        if of_lpl and self.objectives.late is not None:  # it is no term itself
            self.calibrate(of_lpl)
        elif of_lpl:
            self.calibrate(of_lpl / rest)
            rest -= of_lpl
        if of_lpl:
            self.known["lpl"] = self.lpl.weight
        for name, share in shares.items():
            mean = self.positive(name, self.total(lambda forward: forward.objective_losses[name]))
            self.known[name] = share / rest * self.positive("the rest of the loss", fixed) / mean
        if self.lpl is not None:
            self.lpl.weight = self.known["lpl"]
        self.objectives.weights = {name: self.known[name] for name in self.objectives.weights}

    def fixed(self, forward):
        """The sum of the terms whose weights are known, `[]`."""
        terms = {"l2": forward.diffusion_loss, **forward.objective_losses}
        if self.lpl is not None and self.objectives.late is None:
            terms["lpl"] = forward.lpl_stats["sample_weight"] * self.lpl_losses(forward).sum()
        return sum(self.known[name] * term.double() for name, term in terms.items() if self.known[name] is not None)

    def lpl_losses(self, forward):
        """LPL of the samples that it saw, `[k]`, with the blocks' weights as they are now."""
        return forward.lpl_stats["block_loss"].double() @ self.lpl.omega.to(forward.lpl_stats["block_loss"].device)

    def own(self, forward, name):
        """A term's losses, float64, of LPL those that are not gated out; l2's have those of the class behind."""
        if name == "lpl":
            return self.lpl_losses(forward)
        return forward.sample_losses[name][: min(map(len, forward.sample_losses.values()))].double()

    def calibrate(self, share):
        """LPL's weights, see `lpl_utils.calibrate`; what the share is of is all that is fixed."""
        measurements = [(self.fixed(forward), forward.lpl_stats) for forward in self.forwards]
        try:
            calibrate(self.lpl, measurements, share, self.reduce)
        except ValueError as error:
            remedy = "raise --lpl_sigma_threshold, give --lpl_weight a number, or if it overflows try --vae_dtype fp32"
            raise UserError(f"{error}: {remedy}.") from error

    def total(self, value):
        return self.reduce(sum(value(forward).double() for forward in self.forwards)).item()

    def variance(self, name):
        """Of the losses of single samples, zeros included."""
        sums = 0
        for forward in self.forwards:
            losses, number = self.own(forward, name), len(self.own(forward, "l2"))
            sums = sums + torch.stack([torch.full_like(losses.sum(), number), losses.sum(), losses.square().sum()])
        number, total, squares = self.reduce(sums).tolist()
        variance = squares / number - (total / number) ** 2
        return max(0.0, variance) if math.isfinite(variance) else variance

    def positive(self, name, value):
        if value > 0 and math.isfinite(value):
            return value
        reason = "is 0" if value == 0 else "is not finite"
        flag = f"--{name}_weight" if name in OBJECTIVES else "those of the other terms"
        gate = ", or raise --lpl_sigma_threshold" if name in self.objectives.gated else ""
        raise UserError(f"weights can't be measured: {name} {reason}; give {flag} a number{gate}.")


def resume_lpl(args, lpl, state):
    """What calibration froze is not measured again; a number given now for `--lpl_weight` counts, though."""
    try:
        lpl.load_state_dict(state)
    except ValueError as error:
        raise UserError(f"--lpl_num_blocks {args.lpl_num_blocks} differs from the run to resume: {error}") from error
    lpl.weight = given_weights(args).get("lpl", lpl.weight)


def lpl_share(family, tau):
    """Share of the samples that LPL sees: those with sigma / alpha at most tau, as often as they are drawn."""
    weights = family.timestep_weights.double()
    return (weights[sigma_gate(family.alphas, family.sigmas, tau)].sum() / weights.sum()).item()


def describe_lpl(args, family, lpl):
    """What a model card says of LPL, name -> text; empty without it."""
    if lpl is None:
        return {}
    tau = lpl_threshold(args)
    statistics = "without a gradient" if args.lpl_detach_stats else "with their gradient"
    masked = f"masked, searched in the {args.lpl_outlier_source}" if args.lpl_outlier_mask else "not masked"
    facts = {
        "Weight": describe_weight(lpl.weight, rule_of(args.lpl_weight, args.lpl_target_share), "LPL"),
        "Samples": f"those with sigma/alpha at most {tau:g}, {lpl_share(family, tau):.1%} of all",
        "Compared": f"the decoder's mid block and {args.lpl_num_blocks} up blocks, {args.lpl_weighting} weights",
        "Normalisation": f"{args.lpl_normalization} statistics, {statistics}; {args.lpl_reduction} over positions",
        "Outliers": masked,
    }
    if args.lpl_start_step:
        facts["After step"] = args.lpl_start_step
    if args.late_reweight:
        facts["Used"] = "not as a term of the loss but for the weights of the diffusion loss (Eq. 15)"
    return facts


def describe_objectives(args, objectives):
    """What a model card says of the terms beside LPL, name -> text; empty if there is only the diffusion loss."""
    facts = {} if args.l2_weight == 1 else {"Diffusion loss": f"weight {args.l2_weight:g}"}
    details = {
        "self_perceptual": f"t' {args.sp_timestep}, {args.sp_distance}, {args.sp_formulation} form",
        "e_latent_lpips": f"augmentations: {', '.join(args.e_latent_lpips_augmentations or ['none'])}",
        "rgb": "of the decoded images",
        "clean_latent": "of the clean latents",
    }
    for name, weight in objectives.weights.items():
        rule = rule_of(getattr(args, f"{name}_weight"))
        gate = ", only where LPL applies" if name in objectives.gated else ""
        facts[TITLES[name]] = f"weight {describe_weight(weight, rule, 'it')}; {details[name]}{gate}"
    return facts


TITLES = {
    "self_perceptual": "Self-perceptual loss",
    "e_latent_lpips": "E-LatentLPIPS",
    "rgb": "RGB loss",
    "clean_latent": "Clean-latent error",
}


def describe_weight(weight, rule, name):
    kind, number = rule
    aims = {
        "number": "",
        "auto": f", measured so that {name} is {number:.0%} of the loss",
        "variance": f", measured so that its variance is {number:g} times that of the diffusion loss",
    }
    return ("not reached" if weight is None else f"{weight:.5g}") + aims[kind]


def loss_weights(args, alpha, sigma, prediction_type):
    """Per-sample weights `[B]` of the diffusion loss by the flags, or None: min-SNR, or those of Esser et al. 2024.

    alpha, sigma: `[B]`.
    """
    if args.snr_gamma:
        return min_snr_weight(alpha, sigma, args.snr_gamma, prediction_type)
    if args.weighting_scheme == "sigma_sqrt":
        return sigma**-2
    if args.weighting_scheme == "cosmap":
        return 2 / (math.pi * (alpha.square() + sigma.square()))  # 1 - 2 sigma + 2 sigma^2
    return None
