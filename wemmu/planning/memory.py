"""Bytes that one rank holds, by part, and that a checkpoint takes.

The VLM and the VAE are whole on every rank, in the type of the backbones; the bridge lies sharded over all ranks
(ZeRO-3, arXiv 1910.02054), the DiT over those that hold the same part of it. The fullest rank is meant: with pipelining
one of the first stage, which has several micro-batches of the DiT under way.
"""

from collections.abc import Mapping, Sequence

from wemmu.config.stage import Rung, Stage
from wemmu.planning.load import BRIDGE, BUCKET, FP32, Load
from wemmu.planning.moments import Moment
from wemmu.planning.parameters import Part

# AdamW keeps two numbers in fp32 for each that it trains.
MOMENTS = 2 * FP32
# Resident after the imports of `wemmu.train`, 0.9 GB on a CPU; CUDA's own libraries come on top.
LIBRARIES = 2e9


def states(load: Load) -> dict[str, float]:
    """Bytes that a rank holds throughout a step."""
    width, split, trains, more = load.width, load.degrees.split, load.stage.trains, load.padding
    sharded = {part: (n + more.get(part, 0)) / load.degrees.shards(part) for part, n in load.share.items()}
    trained = sum(sharded[part] for part in trains)
    resting = {part: number for part, number in sharded.items() if part not in trains}
    # FSDP2's shards are float32, those of a frozen DiT, too; ZeRO-3 has them in the working type, with float32 masters
    # of what is trained. Weights in fp32 are their own.
    frozen = sum(number * (FP32 if split and part in ("dit", *BRIDGE) else width) for part, number in resting.items())
    working = FP32 if split else width
    # ZeRO-3 has its bucket from the start.
    bucket = BUCKET * (load.degrees.world > 1 and not split)
    return {
        "frozen weights": frozen,
        "working weights": working * trained,
        "master weights": (FP32 - working) and FP32 * trained,
        "moments": MOMENTS * trained,
        "moving average": _average(load.stage) * trained,
        "gradients": FP32 * (trained + bucket),
    }


def gpu(held: Mapping[str, float], kept: Mapping[str, Moment], checkpointed: Mapping[str, Moment]) -> dict[str, float]:
    """Bytes on the fullest GPU, by part: its states, and its moments without and with checkpointing."""
    parts = {
        **held,
        "gathered": kept["end of forward"].gathered,
        "activations": kept["end of forward"].activations,
        "checkpointed activations": checkpointed["end of forward"].activations,
        "VAE at work": kept["VAE at work"].total,
    }
    if "backward of the bridge" in kept:
        parts["whole gradients"] = kept["end of forward"].gradients
        parts["backward of the bridge"] = kept["backward of the bridge"].total
        parts["checkpointed backward of the bridge"] = checkpointed["backward of the bridge"].total
    return parts


def host(load: Load) -> dict[str, float]:
    """Bytes of host memory of one rank."""
    curriculum, sizes, resolution, width = load.curriculum, load.sizes, load.stage.resolution, load.width
    trained = sum(load.share[part] / load.degrees.shards(part) for part in load.stage.trains)
    # DeepSpeed's engine shards each block as it is read; a DiT that is split is read whole and then cut.
    shards = {part: 1 if load.degrees.split else load.degrees.shards(part) for part in load.parameters}
    whole = sum(number / shards[part] for part, number in load.parameters.items())
    pictures = max(1 + sample.pictures for sample in load.samples)
    micro_batches = load.accumulation * (1 + curriculum.data.workers)
    side, latents = sizes.vision.side(resolution), (resolution // sizes.vae.latent_px) ** 2
    features = latents * sizes.vae.latent_channels + side**2 * sizes.vision.out_hidden_size
    return {
        "libraries": LIBRARIES,
        # Before anything goes to the GPU.
        "weights while loading": float(width * whole),
        "checkpoint on its way out": (FP32 + MOMENTS + _average(load.stage)) * trained,
        "pictures read ahead": float(micro_batches * load.micro * pictures * 3 * resolution**2),
        "features remembered": float(curriculum.memory.cached_pictures * features * width),
    }


def host_total(memory: Mapping[str, float]) -> float:
    """The peak: weights are on the GPU before the first batch is read."""
    loading = memory["weights while loading"]
    running = sum(v for name, v in memory.items() if name not in ("libraries", "weights while loading"))
    return memory["libraries"] + max(loading, running)


def checkpoint(parameters: Mapping[Part, int], stage: Stage | Rung, earlier: Sequence[Stage]) -> float:
    """Bytes on disk, all in fp32: weights and moments of what is trained, and weights of what is only carried.

    Carried are parts of the bridge that this stage leaves alone, and the DiT once an earlier stage has trained it.
    """
    carried = {"pathway", "vae_branch", "queries", "position_mlp"} - set(stage.trains)
    if "dit" not in stage.trains and any("dit" in one.trains for one in earlier):
        carried |= {"dit"}
    trained = sum(parameters[part] for part in stage.trains)
    return (FP32 + MOMENTS + _average(stage)) * trained + FP32 * sum(
        number for part, number in parameters.items() if part in carried
    )


def _average(stage: Stage | Rung) -> int:
    """Bytes for each trained parameter of the moving average of the weights, if the stage keeps one."""
    return FP32 if stage.optimizer.ema_decay is not None else 0
