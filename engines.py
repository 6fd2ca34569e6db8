"""What is trained, wherever accelerate's engine keeps it: whole (one process, DDP), sharded by FSDP2, or by DeepSpeed.

    prepare     hands model and optimizer to the engine and returns the `Weights` that go with it
    Weights     whole on every process
    Sharded     FSDP2: every process has a part of each tensor
    Zero        DeepSpeed ZeRO: every process has a part of the float32 weights that the optimizer moves

`masters` are the float32 tensors that this process moves, so that their average (EMA) is sharded as they are.
"""

import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import DistributedType, convert_outputs_to_fp32

from arguments import UserError, first_line


_kept = []  # until the process ends


def prepare(accelerator, args, family, optimizer):
    """The model to call in training, the optimizer, and the trained weights. All processes call this."""
    module, kind = family.model.train(), accelerator.distributed_type
    weights = {DistributedType.FSDP: Sharded, DistributedType.DEEPSPEED: Zero}.get(kind, Weights)(accelerator, family)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    if kind == DistributedType.DEEPSPEED:
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed's calls, at every step
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
        config["gradient_clipping"] = args.max_grad_norm
        config.pop("train_batch_size", None)  # follows from these
    if kind == DistributedType.FSDP:
        module._no_split_modules = blocks_of(module)
    if weights.sharded and accelerator.mixed_precision != "no":
        # Both engines would cast timesteps, too, and bf16 rounds 1023 to 1024: compute as one process does.
        module.forward = convert_outputs_to_fp32(torch.autocast(accelerator.device.type, dtype)(module.forward))
        if kind == DistributedType.FSDP:
            from torch.distributed.fsdp import MixedPrecisionPolicy

            policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    casts = kind == DistributedType.DEEPSPEED and dtype != torch.float32
    before = {name: p.data for name, p in weights.named.items()} if casts else {}
    if kind == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3:
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        shard_before_moving(module, zero, dtype, accelerator.device)
    placement = [False, False] if args.dry_run else None
    weights.model, weights.optimizer = accelerator.prepare(module, optimizer, device_placement=placement)
    if casts:
        weights.restore_precision(before)
    if accelerator.num_processes > 1:  # its destructor waits for threads, which may wait for Python's lock
        _kept.append(weights.model)
    return weights.model, weights.optimizer, weights


def shard_before_moving(module, zero, dtype, device):
    """Each weight goes to the devices in parts; DeepSpeed by itself would first move all of them to each device."""
    import deepspeed

    for p in module.parameters():
        p.data = p.data.to(dtype)
    zero = {name: zero[name] for name in ("stage", "offload_param") if name in zero}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
    for part in module.modules():
        part._buffers |= {name: buffer.to(device) for name, buffer in part.named_buffers(recurse=False)}


def check_engine(accelerator, args):
    """What an engine can't do. Raises UserError."""
    name = engine_name(accelerator)
    if name is None:
        return
    if name == "FSDP2" and not accelerator.is_fsdp2:
        raise UserError("FSDP1 is not supported: set fsdp_version: 2 in the accelerate config.")
    if name == "FSDP2" and accelerator.state.fsdp_plugin.activation_checkpointing:
        raise UserError("fsdp_activation_checkpointing is --gradient_checkpointing here: set it to false.")
    if name != "FSDP2":
        check_deepspeed(accelerator.state.deepspeed_plugin, accelerator.mixed_precision, args)
    optimizer = "--use_8bit_adam" if args.use_8bit_adam else f"--optimizer {args.optimizer}"
    if optimizer != "--optimizer adamw":
        raise UserError(f"{optimizer} needs whole tensors, which {name} shards: use --optimizer adamw, or DDP.")
    for flag in ("train_text_encoder", "bnb_quantization_config_path"):
        if getattr(args, flag, None):
            raise UserError(f"--{flag} does not work with {name}: leave it out, or use DDP.")


def check_deepspeed(plugin, mixed_precision, args):
    """What a DeepSpeed config may say otherwise than the flags. Raises UserError."""
    config = plugin.deepspeed_config
    if plugin.zero_stage == 0:
        raise UserError("DeepSpeed's zero_stage 0 shards nothing: use DDP, or zero_stage 2 or 3.")
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise UserError(f"the DeepSpeed config has its own {section}: remove it, the flags say what it is.")
    for precision in ("bf16", "fp16"):
        if config.get(precision, {}).get("enabled") is True and mixed_precision != precision:
            raise UserError(f"the DeepSpeed config says {precision}, --mixed_precision {mixed_precision}: choose one.")
    offload = (config["zero_optimization"].get(part, {}) for part in ("offload_param", "offload_optimizer"))
    if args.use_ema and "nvme" in (where.get("device") for where in offload):
        raise UserError("--use_ema does not work with weights on NVMe: offload them to the CPU, or leave it out.")


def engine_name(accelerator):
    """As a user would call it; None where the weights are whole, on one process or on several (DDP)."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return "FSDP2" if accelerator.distributed_type == DistributedType.FSDP else None


def blocks_of(module):
    """Names of the classes that FSDP shards one by one: diffusers' list, or the blocks in the model's own lists."""
    there = {type(child).__name__ for child in module.modules()}
    names = [name for name in getattr(module, "_no_split_modules", None) or () if name in there]
    lists = (child for child in module.children() if isinstance(child, torch.nn.ModuleList))
    return names or sorted({type(block).__name__ for blocks in lists for block in blocks})


class Weights:
    """The trained weights of a family's model, whole on every process.

    `model` and `optimizer` are as accelerate has prepared them. All processes call all methods together.
    """

    sharded = False

    def __init__(self, accelerator, family):
        self.accelerator, self.family = accelerator, family
        self.model = self.optimizer = None

    @property
    def named(self):
        return {name: p for name, p in self.family.model.named_parameters() if p.requires_grad}

    @property
    def parameters(self):
        return list(self.named.values())

    @property
    def masters(self):
        """The float32 tensors that the optimizer moves on this process."""
        return self.parameters

    @torch.no_grad()
    def set(self, values):
        """Gives the masters, and so the model, other values."""
        for p, value in zip(self.masters, values):
            p.copy_(value)

    def whole(self):
        """Name -> whole tensor on the CPU, on the main process."""
        if not self.accelerator.is_main_process:
            return {}
        return {name: p.detach().to("cpu", copy=True) for name, p in self.named.items()}

    def make_whole(self):
        """Makes the family's model on the main process one of whole tensors, to be saved; training is over then."""

    def save(self, folder, ema):
        """Weights, optimizer and average, as a checkpoint needs them."""
        if not self.accelerator.is_main_process:
            return
        self.family.save_weights(folder)
        torch.save(self.optimizer.state_dict(), Path(folder, "optimizer.bin"))
        if ema is not None and ema.model_cls is not None:
            ema.save_pretrained(Path(folder, f"{self.family.denoiser_name}_ema"))
        elif ema is not None:
            torch.save(ema.state_dict(), Path(folder, "ema.bin"))

    def load(self, folder, ema):
        """What `save` wrote; `ema` is None if there is none to load."""
        self.family.load_weights(folder)
        self.optimizer.load_state_dict(load_file(folder, "optimizer.bin"))
        if ema is not None and ema.model_cls is not None:
            saved = type(ema).from_pretrained(Path(folder, f"{self.family.denoiser_name}_ema"), ema.model_cls)
            load_average(ema, saved.state_dict())
        elif ema is not None:
            load_average(ema, load_file(folder, "ema.bin"))


class Sharded(Weights):
    """FSDP2: each parameter is a DTensor, of which this process moves its local part."""

    sharded = True

    def __init__(self, accelerator, family):
        super().__init__(accelerator, family)
        self._constant = {}  # what is saved though it is not trained, as it was before an engine could cast it
        if accelerator.is_main_process and not family.args.use_lora:
            state = family.model.state_dict(keep_vars=True)
            self._constant = {n: t.detach().to("cpu", copy=True) for n, t in state.items() if not t.requires_grad}

    @property
    def named(self):
        from torch.distributed.fsdp import FSDPModule

        for module in self.family.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what the last forward pass has left whole
        return super().named

    @property
    def masters(self):
        return [shared(p.to_local()) for p in self.parameters]

    def whole(self):
        state = {}
        for name, p in self.named.items():  # one by one: the device need not hold all of them
            tensor = self._gather(p)
            if self.accelerator.is_main_process:
                state[name] = tensor.detach().to("cpu", copy=True)
        return state

    def make_whole(self):
        state = self.whole()
        if self.accelerator.is_main_process:
            self.family.rebuild_denoiser(self._constant | state)

    def _gather(self, p):
        return p.full_tensor()

    def save(self, folder, ema):
        import torch.distributed.checkpoint as dcp

        with ordinary_errors():
            dcp.save(self._state(ema), checkpoint_id=str(Path(folder, "sharded")))

    def load(self, folder, ema):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        state = self._state(ema)
        with ordinary_errors():
            dcp.load(state, checkpoint_id=str(Path(folder, "sharded")))  # in place
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, state["optimizer"])
        if ema is not None:
            ema.optimization_step = state["ema_steps"].item()
            for mean, saved in zip(ema.shadow_params, state["ema"].values()):
                mean.copy_(saved.to_local())  # with --offload_ema what was loaded is a copy on the device

    def _state(self, ema):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
        from torch.distributed.tensor import DTensor

        state = {"model": {name: p.detach() for name, p in self.named.items()}}
        state["optimizer"] = get_optimizer_state_dict(self.model, self.optimizer.optimizer)
        if ema is not None:
            state["ema"] = {
                name: DTensor.from_local(mean, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                for mean, (name, p) in zip(ema.shadow_params, self.named.items())
            }
            state["ema_steps"] = torch.tensor(ema.optimization_step)
        return state


class Zero(Sharded):
    """DeepSpeed ZeRO: this process moves its part of each weight in float32; the model has them in its precision."""

    def __init__(self, accelerator, family):
        super().__init__(accelerator, family)
        self._stage = accelerator.state.deepspeed_plugin.zero_stage
        self._average = f"ema_{accelerator.process_index}.bin"

    @property
    def masters(self):
        if self._stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param

            return [shared(safe_get_local_fp32_param(p)) for p in self.parameters]
        parts = (p._hp_mapping for p in self.parameters)  # None if it is another process's
        return [shared(part.get_hp_fragment()) for part in parts if part is not None]

    def restore_precision(self, before):
        """DeepSpeed makes its float32 weights of those in half precision. before: name -> whole float32 tensor."""
        self.set([part for name, p in self.named.items() if (part := self._part(p, before[name])) is not None])

    def _part(self, p, whole):
        """What this process moves of a weight, `[n]`, or None."""
        if self._stage == 3:
            size = p.ds_tensor.numel()  # the last process's part is padded
            part = whole.flatten()[size * self.accelerator.process_index :][:size]
            return torch.nn.functional.pad(part, (0, size - part.numel()))
        if p._hp_mapping is not None:
            address = p._hp_mapping.lp_fragment_address
            return whole.flatten()[address.start : address.start + address.numel]

    @torch.no_grad()
    def set(self, values):
        if self._stage < 3:
            super().set(values)
            return self.model.optimizer.update_lp_params()
        from deepspeed.utils import safe_set_local_fp32_param

        for p, value in zip(self.parameters, values):
            safe_set_local_fp32_param(p, value)
            p.ds_tensor.data.copy_(value)
            if p.ds_persist:  # small ones are whole on all processes
                p.partition(has_been_updated=False)
                p.all_gather()

    def _gather(self, p):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(p)

    def save(self, folder, ema):
        with collected_errors(self.model.checkpoint_engine, "save"):
            self.model.save_checkpoint(str(folder), "deepspeed", exclude_frozen_parameters=self.family.args.use_lora)
        if ema is not None:
            torch.save(ema.state_dict(), Path(folder, self._average))

    def load(self, folder, ema):
        self.model.load_checkpoint(str(folder), "deepspeed", load_module_strict=not self.family.args.use_lora)
        if ema is not None:
            load_average(ema, load_file(folder, self._average))


@contextmanager
def ordinary_errors():
    """What torch.distributed.checkpoint raises, the errors of all processes, is no Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        first, *_ = error.failures.values()
        raise OSError(first_line(first[0])) from error


@contextmanager
def collected_errors(target, name):
    """Raises errors of a method at the end only, so that this process still meets the others in between."""
    method, errors = getattr(target, name), []

    def call(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        except Exception as error:
            errors.append(error)

    setattr(target, name, call)
    try:
        yield
    finally:
        setattr(target, name, method)
    if errors:
        raise errors[0]


def shared(tensor):
    """A parameter, as averages want it, with the same values in the same memory."""
    return torch.nn.Parameter(tensor.detach())


def load_file(folder, name):
    return torch.load(Path(folder, name), map_location="cpu", weights_only=True)


def load_average(ema, state):
    """Where the average is it stays, and its decay is that of the flags."""
    devices, decay = [mean.device for mean in ema.shadow_params[:1]], ema.decay
    ema.load_state_dict(state)
    ema.decay = decay
    ema.to(device=devices[0] if devices else None, dtype=torch.float32)
