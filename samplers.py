"""Samplers for `evaluate_lpl.py`: the paper's choices, and the Runge-Kutta method of its Table 9.

`make_sampler` gives a scheduler that any pipeline of diffusers takes in place of its own.
"""

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from noise import is_flow_scheduler, prediction_type


class RungeKutta:
    """The classical Runge-Kutta method of 4th order for dz/dtau = v(z, tau); a step calls the model four times.

    A pipeline sees four timesteps where it asked for one step. Subclasses give the grid tau and v. No model was ever
    trained without any noise: the grid ends at the least, from where the last v leads on to the end.
    """

    order = 4

    def _start(self, taus, least):
        """taus `[N + 1]` from noise to image, the least that was trained; returns those of all calls, `[4 N]`."""
        begin, end = taus[:-1], taus[1:].clamp(min=least)
        self._steps, self._rest, self._calls = (end - begin).tolist(), (taus[-1] - end[-1]).item(), 0
        return torch.stack([begin, (begin + end) / 2, (begin + end) / 2, end], dim=1).flatten()

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        """The point at which the model is to be called next: `[B, ...]` in the precision of `model_output`."""
        (step, stage), sample = divmod(self._calls, 4), sample.float()
        length = self._steps[step]
        slope = self._velocity(model_output.float(), sample)
        if stage == 0:
            self._point, self._slopes = sample, []
        self._slopes.append(slope)
        if stage < 3:
            moved = self._point + length * (0.5, 0.5, 1)[stage] * slope
        else:
            first, second, third, fourth = self._slopes
            moved = self._point + length * (first + 2 * second + 2 * third + fourth) / 6
        self._calls += 1
        if self._calls == 4 * len(self._steps):
            moved = moved + self._rest * slope
        moved = moved.to(model_output.dtype)
        return SchedulerOutput(moved) if return_dict else (moved,)


class FlowMatchRungeKuttaScheduler(RungeKutta, FlowMatchEulerDiscreteScheduler):
    """Flow matching: tau is sigma, and v what the model predicts."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        count = self.config.num_train_timesteps
        self.timesteps = self._start(self.sigmas, least=1 / count) * count

    def _velocity(self, model_output, sample):
        return model_output


class DDIMRungeKuttaScheduler(RungeKutta, DDIMScheduler):
    """Diffusion with z = cos(tau) z_0 + sin(tau) eps: v is v-prediction's, of which epsilon and z_0 are others' words.

    tau is finite also without any signal. The grid is that of DDIM; between two timesteps of training the model is
    given a fractional one.
    """

    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(num_inference_steps, device)
        trained = torch.atan2((1 - self.alphas_cumprod).sqrt(), self.alphas_cumprod.sqrt()).double()  # [T], rising
        end = torch.atan2((1 - self.final_alpha_cumprod).sqrt(), self.final_alpha_cumprod.sqrt()).double()
        taus = self._start(torch.cat([trained[self.timesteps.cpu()], end[None]]), least=trained[0].item())
        self._taus = taus.tolist()
        timesteps = np.interp(taus.numpy(), trained.numpy(), np.arange(len(trained)))
        self.timesteps = torch.from_numpy(timesteps).to(device, torch.float32)

    def _velocity(self, model_output, sample):
        alpha, sigma = np.cos(self._taus[self._calls]), np.sin(self._taus[self._calls])
        if self.config.prediction_type == "v_prediction":
            return model_output
        if self.config.prediction_type == "epsilon":
            return (model_output - sigma * sample) / alpha  # alpha eps - sigma (z - sigma eps) / alpha
        return (alpha * sample - model_output) / sigma


def make_sampler(scheduler, name):
    """The scheduler to sample with, and what a report calls it.

    Args:
        scheduler: the pipeline's own, which says how the model was trained.
        name: `auto` for DDIM with trailing timesteps or, for flow matching, Euler; `rk4`; `pipeline` for its own.
    """
    if name == "pipeline":
        return scheduler, type(scheduler).__name__
    # Given by name: what only stands in the config is dropped where it was a default of the pipeline's scheduler.
    if prediction_type(scheduler) == "flow_prediction":
        sampler = FlowMatchRungeKuttaScheduler if name == "rk4" else FlowMatchEulerDiscreteScheduler
        if is_flow_scheduler(scheduler):
            found = sampler.from_config(scheduler.config, stochastic_sampling=False)
        else:  # Sana's samples diffusion as well, and calls the shift otherwise
            config = scheduler.config
            found = sampler(num_train_timesteps=config.num_train_timesteps, shift=config.get("flow_shift", 1.0))
    else:
        sampler = DDIMRungeKuttaScheduler if name == "rk4" else DDIMScheduler
        unclipped = {"clip_sample": False, "thresholding": False}  # these are for pixels
        found = sampler.from_config(scheduler.config, timestep_spacing="trailing", **unclipped)
    return found, {FlowMatchEulerDiscreteScheduler: "Euler", DDIMScheduler: "DDIM"}.get(sampler, "RK4")
